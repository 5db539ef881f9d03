//! The image as `cargo xtask image` leaves it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use shunt_tests::bed::Bed;
use shunt_tests::process::Command;

use crate::container::{printed, unpack};

/// The image's layout: `SHUNT_IMAGE`, else where `cargo xtask image` leaves it.
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub fn find() -> Self {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/image-layout");
        let dir = std::env::var_os("SHUNT_IMAGE").map_or(built, PathBuf::from);
        assert!(dir.join("oci-layout").is_file(), "there is no image in {}: cargo xtask image", dir.display());
        Self { dir }
    }

    fn json(&self, path: &Path) -> Value {
        let path = self.dir.join(path);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Where the blob of a descriptor is.
    fn blob(&self, descriptor: &Value) -> PathBuf {
        let digest = descriptor["digest"].as_str().expect("a descriptor has a digest");
        self.dir.join("blobs").join(digest.replace(':', "/"))
    }

    fn manifest(&self) -> Value {
        self.json(&self.blob(&self.json(Path::new("index.json"))["manifests"][0]))
    }

    /// Unpacks it into `dir`.
    #[track_caller]
    pub fn unpack(&self, dir: &Path) {
        unpack(&self.blob(&self.manifest()["layers"][0]), dir);
    }
}

#[test]
fn every_blob_is_what_its_name_says() {
    let layout = Layout::find();
    let blobs: Vec<_> = fs::read_dir(layout.dir.join("blobs/sha256")).expect("it is there").flatten().collect();
    assert_eq!(blobs.len(), 3, "layer, configuration, manifest");
    for blob in blobs {
        let mut command = Command::new("sha256sum");
        command.arg(blob.path());
        let digest = printed(command);
        assert_eq!(digest.split_whitespace().next(), blob.file_name().to_str());
    }
}

#[test]
fn the_image_holds_one_program_that_runs_by_itself() {
    let (layout, bed) = (Layout::find(), Bed::new());
    let root = bed.subdir("root");
    layout.unpack(&root);
    let mut find = Command::new("find");
    find.arg(&root).args(["-type", "f", "-printf", "%P %m %U %T@\n"]);
    let mut files: Vec<_> = printed(find).lines().map(str::to_owned).collect();
    files.sort();
    assert_eq!(files, ["etc/nsswitch.conf 644 0 0.0000000000", "usr/bin/shunt 755 0 0.0000000000"]);
    let config = layout.json(&layout.blob(&layout.manifest()["config"]));
    let entry = config["config"]["Entrypoint"][0].as_str().expect("it has an entry point");
    let mut chroot = Command::new("chroot");
    chroot.arg(&root).args([entry, "version"]);
    let version = printed(chroot);
    assert!(version.starts_with(&format!("shunt {}\n", env!("CARGO_PKG_VERSION"))), "{version}");
}

/// Read by a program that had no part in writing it.
#[test]
fn other_tools_read_the_image() {
    let layout = Layout::find();
    let mut skopeo = Command::new("skopeo");
    skopeo.arg("inspect").arg(format!("oci:{}", layout.dir.display()));
    let seen: Value = serde_json::from_str(&printed(skopeo)).expect("skopeo prints JSON");
    assert_eq!(seen["Os"], "linux");
    assert_eq!(seen["Labels"]["org.opencontainers.image.title"], "shunt");
    let bed = Bed::new();
    let copy = bed.subdir("copy");
    let mut skopeo = Command::new("skopeo");
    // Every digest is checked on the way.
    skopeo.args(["--insecure-policy", "copy"]).arg(format!("oci:{}", layout.dir.display()));
    skopeo.arg(format!("docker-archive:{}:shunt:test", copy.join("shunt.tar").display()));
    printed(skopeo);
}
