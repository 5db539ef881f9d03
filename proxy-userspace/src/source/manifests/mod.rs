//! A folder of Kubernetes manifests: `*.yaml`, `*.yml` and `*.json`, not its subfolders, nothing that begins with a dot.
//!
//! | module | holds |
//! |---|---|
//! | [`parse`] | a file's text to objects |
//! | [`folder`] | what all files say together, and what changes when one of them does; pure |
//! | [`watch`] | the folder on disk: which files to read, and when |
//!
//! Whatever swaps a file as a whole (rename, a ConfigMap's `..data` link) counts at once. A file that is being written counts
//! when its writer has closed it, or has left it alone for a second. What one look at the folder shows counts together. A file
//! that does not parse, and an object that cannot be used, keep their last good state and are reported; at the start that is
//! what an earlier run of the agent left in the tables. Of an object in several files the first file, by name, counts.

pub mod folder;
pub mod parse;
mod watch;

use crate::model::{Kind, SourceId, SourceSpec};

pub use watch::{Error, Manifests};

/// This source.
pub const SPEC: SourceSpec = SourceSpec { id: SourceId::Manifests, kinds: &Kind::ALL };
