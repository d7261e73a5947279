//! Stories of whole operations.
