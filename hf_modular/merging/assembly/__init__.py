"""What is more than one tensor of each model: slices, heads, vocabularies and tokenizers."""
