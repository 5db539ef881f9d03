//! `cargo xtask image`: the container image, without a container engine. One static program in an otherwise next to empty file
//! system, as an OCI layout; the bytes depend on the sources and the compiler only. May touch: the target directory, and the
//! archive that is asked for.
//!
//! The program is linked with the C library in it. Debian's glibc (2.34 and newer) carries its resolver along, so the name of an
//! API server is looked up in the pod's /etc/hosts and /etc/resolv.conf as anywhere; the linker's warning about it concerns
//! what else nsswitch.conf could name.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use object::{
    Endianness,
    elf::{FileHeader64, PT_INTERP},
    read::elf::{FileHeader as _, ProgramHeader as _},
};

use crate::{
    build, need,
    oci::{self, Files, Image},
    run::{self, Cmd},
    toolchain::{self, Choice},
    workspace,
};

/// Arguments of `image`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The compiler for the eBPF crate.
    #[arg(long, value_enum, default_value_t)]
    toolchain: Choice,
    /// Name and tag.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
    /// Also write it as one file, which `docker load`, `podman load` and `ctr -n k8s.io images import` read.
    #[arg(long, value_name = "FILE")]
    archive: Option<PathBuf>,
}

impl Default for Args {
    fn default() -> Self {
        Self { toolchain: Choice::Auto, name: DEFAULT_NAME.into(), archive: None }
    }
}

/// As `deploy/` names it.
const DEFAULT_NAME: &str = concat!("shunt:", env!("CARGO_PKG_VERSION"));
/// Path of the program in the image; the unit of its entry point, and of `kubectl exec`.
const PROGRAM: &str = "usr/bin/shunt";
/// Sources of host names, in order (nsswitch.conf(5)).
const NSSWITCH: (&str, &str) = ("etc/nsswitch.conf", "hosts: files dns\n");
/// The profile of the workspace by which it is built.
const PROFILE: &str = "image";

/// `target/image-layout` holds the image as an OCI layout.
pub fn run(args: &Args) -> Result<()> {
    need::ensure(&build::NEEDS)?;
    build::object(&toolchain::ensure(args.toolchain)?)?;
    let program = fs::read(build_program()?).context("cannot read the program")?;
    refuse_dynamic(&program)?;
    let files =
        Files::from([(PROGRAM.to_owned(), (0o755, program)), (NSSWITCH.0.to_owned(), (0o644, NSSWITCH.1.into()))]);
    let labels = labels();
    let image = Image {
        name: &args.name,
        architecture: architecture(env::consts::ARCH),
        entrypoint: &format!("/{PROGRAM}"),
        labels: &labels,
        files: &files,
    };
    let layout = image.layout()?;
    let dir = workspace::image();
    write(&dir, &layout)?;
    run::say(&format!("{} is in {}, as an OCI layout", args.name, dir.display()));
    if let Some(file) = &args.archive {
        fs::write(file, oci::tar(&layout)?).with_context(|| format!("cannot write {}", file.display()))?;
        run::say(&format!(
            "{} is for every node: `ctr -n k8s.io images import`, or `skopeo copy oci-archive:` to your registry",
            file.display()
        ));
    }
    Ok(())
}

/// Builds the program with the C library in it, and returns where it is.
fn build_program() -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let build =
        Cmd::new("cargo").args(["build", "--profile", PROFILE, "--package", "proxy-userspace", "--bin", "shunt"]);
    // With a target that is named, the flags are for it alone and not for programs that run during the build.
    let build = build.args(["--target", &target]).env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    build.dir(workspace::root()).hint("the compiler's message above says why").run()?;
    Ok(workspace::target().join(target).join(PROFILE).join("shunt"))
}

/// Fails if the program wants a dynamic linker, which the image has not.
fn refuse_dynamic(program: &[u8]) -> Result<()> {
    let header = FileHeader64::<Endianness>::parse(program).context("the program is no ELF file of 64 bits")?;
    let endian = header.endian()?;
    if header.program_headers(endian, program)?.iter().any(|segment| segment.p_type(endian) == PT_INTERP) {
        bail!("the program is not static: it wants a dynamic linker");
    }
    Ok(())
}

/// What Go, and with it the image specification, calls an architecture of Rust.
fn architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn labels() -> BTreeMap<&'static str, String> {
    let text = [
        ("org.opencontainers.image.title", "shunt"),
        ("org.opencontainers.image.description", "Services in the kernel, in place of kube-proxy"),
        ("org.opencontainers.image.version", env!("CARGO_PKG_VERSION")),
        ("org.opencontainers.image.licenses", env!("CARGO_PKG_LICENSE")),
    ];
    text.into_iter().map(|(name, value)| (name, value.to_owned())).collect()
}

/// Makes `dir` hold exactly these files.
fn write(dir: &Path, files: &Files) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    for (path, (_, content)) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().expect("it is below the layout's directory"))?;
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_a_dynamic_linker_is_refused() {
        let own = fs::read(env::current_exe().expect("this test is a file")).expect("it can be read");
        let error = refuse_dynamic(&own).expect_err("tests are linked as usual");
        assert!(error.to_string().contains("not static"), "{error}");
        assert!(refuse_dynamic(b"text").is_err());
    }

    #[test]
    fn architectures_have_the_names_of_go() {
        assert_eq!(["x86_64", "aarch64", "riscv64"].map(architecture), ["amd64", "arm64", "riscv64"]);
    }
}
