//! A browser without a window, in a namespace: Debian's `chromium`, driven over a pair of pipes by its DevTools protocol
//! (chromedevtools.github.io/devtools-protocol), of which a handful of methods is used.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::place::Place;
use crate::process::Process;
use crate::wait;

/// How a page is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// Points.
    pub width: u32,
    /// Points.
    pub height: u32,
    /// The user prefers dark pages.
    pub is_dark: bool,
}

/// A browser with one page; dropped, it is killed.
#[derive(Debug)]
pub struct Browser {
    process: Process,
    commands: File,
    answers: BufReader<File>,
    session: Option<String>,
    number: u64,
    complaints: Vec<String>,
}

impl Browser {
    /// One that runs in `place` and shows an empty page.
    #[track_caller]
    pub fn start(bed: &Bed, place: &Place) -> Self {
        let dir = bed.subdir("browser");
        let [commands, answers] = ["commands", "answers"].map(|name| {
            let path = dir.join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRWXU)
                .unwrap_or_else(|error| panic!("no pipe {}: {error}", path.display()));
            path
        });
        // The protocol wants descriptors 3 and 4.
        let mut command = place.command("sh");
        command.arg("-c").arg(
            "exec chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run \
             --disable-extensions --disable-background-networking --disable-component-update --hide-scrollbars \
             --remote-debugging-pipe --user-data-dir=\"$2\" about:blank 3<\"$0\" 4>\"$1\"",
        );
        command.arg(&commands).arg(&answers).arg(dir.join("profile")).env("HOME", &dir);
        let process = Process::start("browser", command);
        let open = |path: &Path, is_written: bool| {
            // Both directions, so that opening waits for nobody.
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap_or_else(|error| panic!("no pipe ({is_written}): {error}"))
        };
        let (commands, answers) = (open(&commands, true), BufReader::new(open(&answers, false)));
        let mut browser = Self { process, commands, answers, session: None, number: 0, complaints: Vec::new() };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached =
            browser.call("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Runtime", "Log", "Page", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Shows a page on such a screen.
    #[track_caller]
    pub fn open(&mut self, url: &str, screen: Screen) {
        self.set_screen(screen);
        self.call("Page.navigate", json!({ "url": url }));
    }

    /// Changes the screen.
    #[track_caller]
    pub fn set_screen(&mut self, screen: Screen) {
        let Screen { width, height, is_dark } = screen;
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
        let scheme = if is_dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// The value of an expression in the page; null while it cannot be evaluated.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let answer = self.call("Runtime.evaluate", json!({ "expression": expression, "returnByValue": true }));
        answer["result"]["value"].clone()
    }

    /// Waits until an expression in the page is true.
    #[track_caller]
    pub fn wait(&mut self, expression: &str) {
        if !wait::came_true(|| self.value(expression) == json!(true)) {
            let body = self.value("document.body.innerText");
            panic!("waited in vain for {expression} in a page that reads\n{body}\nand complains {:?}", self.complaints);
        }
    }

    /// Errors that the page or the browser has told until now: exceptions, refused loads, violations of a policy.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Writes what is to be seen to a PNG file; the whole page, also what lies below the screen, if `is_whole`.
    #[track_caller]
    pub fn screenshot(&mut self, path: &Path, is_whole: bool) {
        let answer = self.call("Page.captureScreenshot", json!({ "format": "png", "captureBeyondViewport": is_whole }));
        let image = decode_base64(answer["data"].as_str().expect("an image"));
        std::fs::write(path, image).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    /// Sends a command and waits for its result.
    #[track_caller]
    fn call(&mut self, method: &str, params: Value) -> Value {
        self.number += 1;
        let mut command = json!({ "id": self.number, "method": method, "params": params });
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).expect("the browser takes commands");
        loop {
            let mut text = Vec::new();
            // The pipe is open at this end too: it would never tell that the browser is gone.
            let mut patience = [PollFd::new(self.answers.get_ref().as_fd(), PollFlags::POLLIN)];
            let waits = self.answers.buffer().is_empty();
            let limit = PollTimeout::try_from(wait::PATIENCE).expect("less than a month");
            let is_silent = waits && poll(&mut patience, limit).expect("a pipe can be waited for") == 0;
            assert!(!is_silent, "the browser does not answer {method}: {}", self.process);
            self.answers.read_until(0, &mut text).expect("the browser answers");
            text.pop();
            let message: Value = serde_json::from_slice(&text)
                .unwrap_or_else(|error| panic!("{error}: {}\n{}", String::from_utf8_lossy(&text), self.process));
            if message["id"] == json!(self.number) {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.complaints.extend(complaint(&message));
        }
    }
}

/// What an event complains about.
fn complaint(event: &Value) -> Option<String> {
    let params = &event["params"];
    match event["method"].as_str()? {
        "Runtime.exceptionThrown" => Some(params["exceptionDetails"].to_string()),
        "Runtime.consoleAPICalled" if params["type"] == "error" || params["type"] == "warning" => {
            Some(params["args"].to_string())
        }
        "Log.entryAdded" if params["entry"]["level"] == "error" || params["entry"]["level"] == "warning" => {
            Some(format!("{} {}", params["entry"]["text"], params["entry"]["url"]))
        }
        "Network.loadingFailed" => Some(format!("not loaded: {params}")),
        _ => None,
    }
}

/// RFC 4648, section 4.
fn decode_base64(text: &str) -> Vec<u8> {
    let sixes = text.bytes().filter_map(|byte| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    });
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for six in sixes {
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

#[test]
fn base64_is_decoded() {
    for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmE=", "fooba")] {
        assert_eq!(decode_base64(text), bytes.as_bytes());
    }
}
