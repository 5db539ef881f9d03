//! Sources: from a foreign API to model types, nothing more.
//!
//! | module | holds |
//! |---|---|
//! | [`contact`] | whether a source hears from where it reads |
//! | [`decode`] | Kubernetes objects, as JSON or YAML, to model types |
//! | [`kubernetes`] | the Kubernetes API |
//! | [`manifests`] | a folder of Kubernetes manifests |
//!
//! A source speaks the contract of [`crate::model::update`] into a channel and knows nothing of what becomes of it. It
//! reports what it cannot use, keeps the last good state of it, and goes on.

pub mod contact;
pub mod decode;
pub mod kubernetes;
pub mod manifests;
