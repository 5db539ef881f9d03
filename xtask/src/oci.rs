//! A container image as files: the layout that the OCI image specification (v1.1) describes, made from the files that the image
//! shall hold. Same files in, same bytes out. Pure.

use std::{collections::BTreeMap, io::Write as _};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The time of everything in an image: the same whenever it is built.
const EPOCH: &str = "1970-01-01T00:00:00Z";

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Files by path below the root, without a leading slash: mode and content.
pub type Files = BTreeMap<String, (u32, Vec<u8>)>;

/// What an image is.
#[derive(Debug)]
pub struct Image<'a> {
    /// Name and tag, as in `shunt:0.1.0`.
    pub name: &'a str,
    /// As in `GOARCH`.
    pub architecture: &'a str,
    /// Path of the program that it runs.
    pub entrypoint: &'a str,
    /// Annotations of the specification, such as `org.opencontainers.image.title`.
    pub labels: &'a BTreeMap<&'static str, String>,
    /// What it holds.
    pub files: &'a Files,
}

impl Image<'_> {
    /// The files of the image's layout, and with them the `manifest.json` that Docker before version 25 reads.
    pub fn layout(&self) -> Result<Files> {
        let tar = tar(self.files).context("cannot make the layer")?;
        let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
        gzip.write_all(&tar)?;
        let mut blobs = Blobs::default();
        let layer = blobs.add(LAYER, gzip.finish()?);
        let config = blobs.add_json(CONFIG, &self.config(&digest(&tar)));
        let manifest = blobs.add_json(
            MANIFEST,
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
                "annotations": self.labels}),
        );
        let docker = json!([{"Config": blob_path(&config), "RepoTags": [self.name], "Layers": [blob_path(&layer)]}]);
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [self.named(manifest)]});
        let mut files = blobs.0;
        files.insert("oci-layout".into(), (0o644, text(&json!({"imageLayoutVersion": "1.0.0"}))));
        files.insert("index.json".into(), (0o644, text(&index)));
        files.insert("manifest.json".into(), (0o644, text(&docker)));
        Ok(files)
    }

    fn config(&self, diff_id: &str) -> Value {
        // Programs that are run in the container by name are found.
        let path = self.entrypoint.rsplit_once('/').map_or("/", |(dir, _)| dir);
        json!({
            "created": EPOCH,
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": [self.entrypoint],
                "Env": [format!("PATH={path}")],
                "Labels": self.labels,
                "WorkingDir": "/",
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created": EPOCH, "created_by": "cargo xtask image"}],
        })
    }

    /// The manifest's descriptor as the index has it.
    fn named(&self, mut manifest: Value) -> Value {
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        // What containerd calls it when the kubelet asks for a name without a registry.
        let full = if self.name.contains('/') { self.name.into() } else { format!("docker.io/library/{}", self.name) };
        manifest["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": full});
        manifest
    }
}

/// What the layout names by digest.
#[derive(Default)]
struct Blobs(Files);

impl Blobs {
    /// Keeps a blob and returns its descriptor.
    fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let descriptor = json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()});
        self.0.insert(blob_path(&descriptor), (0o644, bytes));
        descriptor
    }

    fn add_json(&mut self, media_type: &str, value: &Value) -> Value {
        self.add(media_type, text(value))
    }
}

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// `sha256:` and the digest in hexadecimal.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn blob_path(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().expect("we made it");
    format!("blobs/{}", digest.replace(':', "/"))
}

/// The files as a tar archive, each after the directories it is in; owned by root, of no time.
pub fn tar(files: &Files) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut made = Vec::new();
    for (path, (mode, content)) in files {
        for (end, _) in path.match_indices('/') {
            let dir = &path[..=end];
            if !made.contains(&dir) {
                append(&mut archive, tar::EntryType::Directory, dir, 0o755, &[])?;
                made.push(dir);
            }
        }
        append(&mut archive, tar::EntryType::Regular, path, *mode, content)?;
    }
    Ok(archive.into_inner()?)
}

fn append(
    archive: &mut tar::Builder<Vec<u8>>,
    kind: tar::EntryType,
    path: &str,
    mode: u32,
    content: &[u8],
) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    Ok(archive.append_data(&mut header, path, content)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Files {
        let files = Files::from([
            ("usr/bin/a".to_owned(), (0o755, b"program".to_vec())),
            ("etc/b".to_owned(), (0o644, b"text".to_vec())),
            ("usr/lib/c".to_owned(), (0o644, Vec::new())),
        ]);
        let labels = BTreeMap::from([("org.opencontainers.image.title", "a".to_owned())]);
        let image =
            Image { name: "a:1", architecture: "amd64", entrypoint: "/usr/bin/a", labels: &labels, files: &files };
        image.layout().expect("memory takes everything")
    }

    fn json_of(files: &Files, path: &str) -> Value {
        serde_json::from_slice(&files[path].1).expect("JSON")
    }

    /// The blob that a descriptor names, if digest and size are right.
    fn blob<'a>(files: &'a Files, descriptor: &Value) -> &'a [u8] {
        let bytes = &files[&blob_path(descriptor)].1;
        assert_eq!(
            (descriptor["digest"].as_str(), descriptor["size"].as_u64()),
            (Some(digest(bytes).as_str()), Some(bytes.len() as u64))
        );
        bytes
    }

    #[test]
    fn digests_lead_from_the_index_to_the_files() {
        let files = layout();
        let index = json_of(&files, "index.json");
        let manifest: Value = serde_json::from_slice(blob(&files, &index["manifests"][0])).expect("JSON");
        let config: Value = serde_json::from_slice(blob(&files, &manifest["config"])).expect("JSON");
        let mut tar = Vec::new();
        let gzip = flate2::read::GzDecoder::new(blob(&files, &manifest["layers"][0]));
        std::io::copy(&mut { gzip }, &mut tar).expect("gzip");
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&tar));
        let mut archive = tar::Archive::new(&tar[..]);
        let paths: Vec<_> = archive
            .entries()
            .expect("tar")
            .map(|entry| entry.expect("an entry").path().expect("a path").display().to_string())
            .collect();
        assert_eq!(paths, ["etc/", "etc/b", "usr/", "usr/bin/", "usr/bin/a", "usr/lib/", "usr/lib/c"]);
        assert_eq!(config["config"]["Entrypoint"], json!(["/usr/bin/a"]));
        assert_eq!(config["config"]["Env"], json!(["PATH=/usr/bin"]));
        assert_eq!(json_of(&files, "manifest.json")[0]["Config"], blob_path(&manifest["config"]));
    }

    #[test]
    fn the_same_files_make_the_same_image() {
        assert_eq!(layout(), layout());
    }

    #[test]
    fn the_digest_of_nothing_is_the_known_one() {
        assert_eq!(digest(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
