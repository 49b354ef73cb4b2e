//! The bundled images lumen and micro: their recipe, the builder, and the store that keeps built images.
//!
//! The daemon reads images through [`ImageStore`]; the program `catalyst-image` builds them (and is the one
//! that needs root). A version of an image never changes once it is in the store, since the disks of VMs are
//! overlays on it.

pub mod build;
pub mod bzimage;
pub mod cpio;
pub mod digest;
pub mod manifest;
pub mod modules;
pub mod recipe;
pub mod sources;
pub mod store;
pub mod template;

pub use build::{BuildError, BuildOptions, BuildOutcome, Progress, build};
pub use manifest::{FileEntry, Machine, Manifest, Package};
pub use store::{Image, ImageError, ImageInfo, ImageState, ImageStore, Removal, VerifyProgress};
pub use template::{NewTemplate, Origin};
