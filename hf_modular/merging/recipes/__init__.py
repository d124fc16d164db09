"""What a merge is told: recipes in mergekit's format, and the settings of each tensor."""
