"""Per-image verdicts, result files, and the tables made from them."""
