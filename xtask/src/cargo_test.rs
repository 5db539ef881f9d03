//! The workspace's test binaries: which there are, how they are built, what runs where. The answers of cargo are read
//! here; nothing is run but cargo.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{run::Cmd, workspace};

/// The package whose integration tests are the privileged suites.
const SUITES_PACKAGE: &str = "shunt-tests";

/// One executable full of tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestBinary {
    /// The package it tests.
    pub package: String,
    /// The target's name within the package; for a suite, the suite's name.
    pub target: String,
    /// Whether it must run as root: a suite.
    pub is_privileged: bool,
    /// The executable.
    pub path: PathBuf,
}

impl TestBinary {
    /// The name for a reader: the suite's, or package and target.
    pub fn label(&self) -> String {
        if self.is_privileged { self.target.clone() } else { format!("{}/{}", self.package, self.target) }
    }
}

/// The tests asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// What needs no privilege.
    Unit,
    /// One package's tests that need no privilege.
    Package(String),
    /// One suite.
    Suite(String),
    /// One package's file of tests that need no privilege, by both names.
    File(String, String),
    /// Every test whose name contains the text.
    Filter(String),
}

/// The names a selection can speak of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    packages: Vec<String>,
    suites: Vec<String>,
    /// Package and name of the other integration tests.
    files: Vec<(String, String)>,
    libraries: Vec<String>,
    /// Source file and name of the programs of the suites' package.
    programs: Vec<(String, String)>,
}

impl Names {
    /// Asks cargo.
    pub fn look() -> Result<Self> {
        let metadata =
            Cmd::new("cargo").args(["metadata", "--no-deps", "--format-version", "1"]).dir(workspace::root());
        Ok(parse_metadata(&serde_json::from_str(&metadata.read()?).context("cargo metadata printed no JSON")?))
    }

    /// The name of the program that is made from the file `source`.rs of the suites' package.
    pub fn program(&self, source: &str) -> Option<String> {
        let end = format!("/{source}.rs");
        self.programs.iter().find(|(path, _)| path.ends_with(&end)).map(|(_, name)| name.clone())
    }

    /// The packages with documentation tests among the selected.
    pub fn documented(&self, selection: &Selection) -> Vec<&str> {
        let is_wanted = |package: &&String| match selection {
            Selection::All | Selection::Unit => true,
            Selection::Package(name) => name == *package,
            Selection::Suite(_) | Selection::File(..) | Selection::Filter(_) => false,
        };
        self.libraries.iter().filter(is_wanted).map(String::as_str).collect()
    }

    /// Reads what the user typed.
    ///
    /// Errors: `unit` together with a suite's name.
    pub fn select(&self, unit: bool, name: Option<&str>) -> Result<Selection> {
        let is_in = |names: &[String], name: &str| names.iter().any(|known| known == name);
        let file = name.and_then(|name| self.files.iter().find(|(_, file)| file == name));
        Ok(match name {
            None if unit => Selection::Unit,
            None => Selection::All,
            Some(name) if is_in(&self.suites, name) && unit => {
                bail!("{name} is a suite and needs root: leave out --unit")
            }
            Some(name) if is_in(&self.suites, name) => Selection::Suite(name.into()),
            Some(name) if is_in(&self.packages, name) => Selection::Package(name.into()),
            Some(name) => match file {
                Some((package, file)) => Selection::File(package.clone(), file.clone()),
                None => Selection::Filter(name.into()),
            },
        })
    }
}

fn parse_metadata(metadata: &Value) -> Names {
    let mut names = Names::default();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let package_name = text(&package["name"]);
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_suite = package_name == SUITES_PACKAGE && has_kind(target, "test");
            if is_suite {
                names.suites.push(text(&target["name"]));
            } else if package_name == SUITES_PACKAGE && has_kind(target, "bin") {
                names.programs.push((text(&target["src_path"]), text(&target["name"])));
            } else if has_kind(target, "test") {
                names.files.push((package_name.clone(), text(&target["name"])));
            } else if has_kind(target, "lib") && target["doctest"] == true {
                names.libraries.push(package_name.clone());
            }
        }
        names.packages.push(package_name);
    }
    names
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn has_kind(target: &Value, kind: &str) -> bool {
    target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|known| known == kind))
}

/// Builds the selected test binaries; those without privilege come first.
pub fn build(selection: &Selection) -> Result<Vec<TestBinary>> {
    let which: &[&str] = match selection {
        // The feature brings the tests of `verify_load`.
        Selection::All | Selection::Unit | Selection::Filter(_) => {
            &["--workspace", "--features", "xtask/loader", "--tests"]
        }
        Selection::Package(name) => &["--package", name, "--tests"],
        Selection::Suite(name) => &["--package", SUITES_PACKAGE, "--test", name],
        Selection::File(package, name) => &["--package", package, "--test", name],
    };
    let mut cargo =
        Cmd::new("cargo").args(["test", "--no-run", "--message-format=json-render-diagnostics"]).args(which);
    cargo = cargo.dir(workspace::root()).stdout(Stdio::piped());
    let child = cargo.spawn()?;
    let output = child.wait_with_output().context("cargo's messages cannot be read")?;
    if !output.status.success() {
        bail!("`{}`: {}\n  the compiler's message above says why", cargo.shown(), output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut binaries: Vec<_> =
        messages.lines().filter_map(parse_artifact).filter(|b| is_selected(b, selection)).collect();
    binaries.sort_by_key(|binary| binary.is_privileged);
    Ok(binaries)
}

fn is_selected(binary: &TestBinary, selection: &Selection) -> bool {
    match selection {
        Selection::All | Selection::Filter(_) => true,
        Selection::Unit | Selection::Package(_) => !binary.is_privileged,
        Selection::Suite(name) | Selection::File(_, name) => *name == binary.target,
    }
}

/// The test binary that one line of cargo's messages speaks of, if it does.
fn parse_artifact(line: &str) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?;
    let target = &message["target"];
    // A package's directory names it: `.../tests/Cargo.toml`.
    let dir = Path::new(message["manifest_path"].as_str()?).parent()?.file_name()?.to_str()?;
    let package = if dir == "tests" { SUITES_PACKAGE } else { dir };
    Some(TestBinary {
        package: package.to_owned(),
        target: text(&target["name"]),
        is_privileged: package == SUITES_PACKAGE && has_kind(target, "test"),
        path: path.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        parse_metadata(&serde_json::json!({ "packages": [
            { "name": "proxy-common", "targets": [
                { "name": "proxy_common", "kind": ["lib"], "doctest": true },
                { "name": "scenarios", "kind": ["test"], "doctest": false },
            ] },
            { "name": "shunt-tests", "targets": [
                { "name": "shunt_tests", "kind": ["lib"], "doctest": true },
                { "name": "shunt-demo", "kind": ["bin"], "src_path": "/src/tests/src/bin/demo.rs", "doctest": false },
                { "name": "lifetime", "kind": ["test"], "doctest": false },
            ] },
        ] }))
    }

    #[test]
    fn a_name_is_a_suite_a_package_a_file_or_else_a_filter() {
        let select = |unit, name| names().select(unit, name).expect("can be selected");
        assert_eq!(select(false, None), Selection::All);
        assert_eq!(select(true, None), Selection::Unit);
        assert_eq!(select(false, Some("lifetime")), Selection::Suite("lifetime".into()));
        assert_eq!(select(false, Some("proxy-common")), Selection::Package("proxy-common".into()));
        assert_eq!(select(true, Some("scenarios")), Selection::File("proxy-common".into(), "scenarios".into()));
        assert_eq!(select(true, Some("demo")), Selection::Filter("demo".into()));
        assert!(names().select(true, Some("lifetime")).is_err());
    }

    #[test]
    fn programs_are_known_by_their_source() {
        assert_eq!(names().program("demo").as_deref(), Some("shunt-demo"));
        assert_eq!(names().program("bench"), None);
    }

    #[test]
    fn documentation_is_tested_with_its_package() {
        assert_eq!(names().documented(&Selection::Unit), ["proxy-common", "shunt-tests"]);
        assert_eq!(names().documented(&Selection::Package("proxy-common".into())), ["proxy-common"]);
        assert!(names().documented(&Selection::Suite("lifetime".into())).is_empty());
    }

    fn artifact(dir: &str, kind: &str, test: bool) -> String {
        serde_json::json!({
            "reason": "compiler-artifact", "manifest_path": format!("/src/{dir}/Cargo.toml"),
            "target": { "name": "it", "kind": [kind] }, "profile": { "test": test }, "executable": "/t/it-1",
        })
        .to_string()
    }

    #[test]
    fn only_the_integration_tests_of_the_tests_package_are_privileged() {
        let is_privileged = |dir, kind| parse_artifact(&artifact(dir, kind, true)).map(|binary| binary.is_privileged);
        assert_eq!(is_privileged("tests", "test"), Some(true));
        assert_eq!(is_privileged("tests", "lib"), Some(false));
        assert_eq!(is_privileged("proxy-common", "test"), Some(false));
        assert_eq!(parse_artifact(&artifact("tests", "bin", false)), None);
    }
}
