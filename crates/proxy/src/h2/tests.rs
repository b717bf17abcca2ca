//! Whole connections against raw frames, and against each other.
