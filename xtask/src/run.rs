//! Runs other programs: every command is shown before it starts, and a failure names it. Starts nothing on its own.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader, IsTerminal as _},
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// A command together with what shows it and the advice for when it fails.
pub struct Cmd {
    command: Command,
    words: Vec<String>,
    vars: Vec<String>,
    dir: Option<String>,
    hint: String,
}

impl Cmd {
    /// A command that inherits our environment and output.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let words = vec![quote(program.as_ref())];
        Self { command: Command::new(program), words, vars: Vec::new(), dir: None, hint: String::new() }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.words.push(quote(arg.as_ref()));
        self.command.arg(arg);
        self
    }

    /// Adds several arguments.
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets a variable, and shows it.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.vars.push(format!("{name}={}", quote(value.as_ref())));
        self.env_quietly(name, value)
    }

    /// Sets a variable that a reader's own shell has in its own way, and does not show it.
    pub fn env_quietly(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Removes a variable; not shown, since it restores what the reader's own shell would have.
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Runs in `dir`.
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        let is_here = std::env::current_dir().is_ok_and(|here| here == dir.as_ref());
        self.dir = (!is_here).then(|| quote(dir.as_ref().as_os_str()));
        self.command.current_dir(dir);
        self
    }

    /// What to do when this command fails; printed after its name.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Where the command's input comes from.
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.command.stdin(stdin);
        self
    }

    /// Where the command's own output goes.
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.command.stdout(stdout);
        self
    }

    /// The line a reader could type.
    pub fn shown(&self) -> String {
        let enter = self.dir.iter().map(|dir| format!("cd {dir} &&"));
        enter.chain(self.vars.iter().cloned()).chain(self.words.iter().cloned()).collect::<Vec<_>>().join(" ")
    }

    /// Runs the command to its end, without input.
    ///
    /// Errors: it cannot be started, or it fails; both name the command and its hint.
    pub fn run(mut self) -> Result<()> {
        show(&self.shown());
        let status = self.command.stdin(Stdio::null()).status();
        let status = status.with_context(|| self.failure("cannot be started"))?;
        if !status.success() {
            bail!(self.failure(&status.to_string()));
        }
        Ok(())
    }

    /// Runs the command to its end as [`Cmd::run`] does; of its error output only what `keep` wants is shown.
    pub fn run_filtered(mut self, mut keep: impl FnMut(&str) -> bool) -> Result<()> {
        if !is_plain() {
            // Cargo sees a pipe where our reader sees a terminal.
            self.command.env("CARGO_TERM_COLOR", "always");
        }
        self.command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.spawn()?;
        let stderr = child.stderr.take().expect("standard error was asked to be a pipe");
        for line in BufReader::new(stderr).split(b'\n') {
            let line = line.with_context(|| self.failure("its output cannot be read"))?;
            let line = String::from_utf8_lossy(&line);
            if keep(&line) {
                eprintln!("{line}");
            }
        }
        let status = child.wait()?;
        if !status.success() {
            bail!(self.failure(&status.to_string()));
        }
        Ok(())
    }

    /// Starts the command and shows it.
    pub fn spawn(&mut self) -> Result<Child> {
        show(&self.shown());
        self.command.spawn().with_context(|| self.failure("cannot be started"))
    }

    /// The standard output of a command that only looks; not shown. Errors as in [`Cmd::run`].
    pub fn read(mut self) -> Result<String> {
        let output = self.command.stdin(Stdio::null()).output();
        let output = output.with_context(|| self.failure("cannot be started"))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{}\n{}", self.failure(&output.status.to_string()), stderr.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether a command that only looks succeeds; its output is dropped.
    pub fn succeeds(mut self) -> bool {
        self.command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
    }

    fn failure(&self, what: &str) -> String {
        let hint = if self.hint.is_empty() { String::new() } else { format!("\n  {}", self.hint) };
        format!("`{}`: {what}{hint}", self.shown())
    }
}

/// Prints the `$ command` line, dim on a terminal.
pub fn show(line: &str) {
    if is_plain() {
        eprintln!("$ {line}");
    } else {
        eprintln!("\x1b[2m$ {line}\x1b[0m");
    }
}

/// Prints a line of our own.
pub fn say(line: &str) {
    if is_plain() {
        eprintln!("{line}");
    } else {
        eprintln!("\x1b[1m{line}\x1b[0m");
    }
}

fn is_plain() -> bool {
    !std::io::stderr().is_terminal() || std::env::var_os("NO_COLOR").is_some()
}

/// The word as a shell would need it.
fn quote(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The program's path, looked for in PATH and in the directories of administrators, which an ordinary user's PATH lacks.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let mut dirs: Vec<_> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    dirs.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(Into::into));
    dirs.push(crate::workspace::cargo_home().join("bin"));
    dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// PATH with cargo's own programs and those of administrators at its end, for the programs we start.
pub fn search_path() -> OsString {
    let mut dirs: Vec<_> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    for dir in [crate::workspace::cargo_home().join("bin"), "/usr/sbin".into(), "/sbin".into()] {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    std::env::join_paths(dirs).expect("the entries of PATH hold no separator")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_line_can_be_typed_into_a_shell() {
        let cmd = Cmd::new("echo").args(["a b", "", "it's", "--x=1"]).env("A", "x y").dir("/tmp/d");
        assert_eq!(cmd.shown(), r"cd /tmp/d && A='x y' echo 'a b' '' 'it'\''s' --x=1");
    }

    #[test]
    fn failure_names_the_command_and_the_hint() {
        let error = Cmd::new("false").hint("type something else").run().expect_err("false fails");
        let text = format!("{error:#}");
        assert!(text.contains("`false`") && text.contains("type something else"), "{text}");
    }
}
