//! Sample services and load for the demonstration. They know nothing of the mesh.
