//! What this kernel can do, asked once.
