"""A merge from its beginning to its end, on disk or in memory, with its plan, its verification and its report."""
