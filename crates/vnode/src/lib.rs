//! The virtual node: registration, Pods, kubelet endpoints.
