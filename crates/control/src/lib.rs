//! The control plane: sources, compilation, certificates, delivery, status.
