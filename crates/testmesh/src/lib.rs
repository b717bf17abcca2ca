//! A whole mesh in one process or in network namespaces, for tests.
