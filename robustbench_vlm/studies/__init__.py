"""Studies: several trainings that answer one question, attacked and compared over paired seeds."""
