//! Image reference to verified, shared EROFS layers.
