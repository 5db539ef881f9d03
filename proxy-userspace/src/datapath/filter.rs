//! Filters of devices as attachments that outlive the agent: the pins that tell of them, the qdiscs that they are in.
//!
//! A filter has no link to pin. So its program is pinned under the name that a link would have: a pin tells that there may be
//! a filter, and is there before it and after it. A qdisc that was made for it is noted beforehand likewise.
//! May touch: filters and qdiscs by way of `clsact`, their pins and notes.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use super::clsact::{self, Hook};
use super::pins::{self, Pins, at};
use super::{namespaces, sys};

/// Why a filter could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pin directory.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// The kernel refuses it.
    #[error("cannot {action} a filter")]
    Kernel {
        /// "attach", "replace" or "examine".
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kernel { action, source }
}

/// A filter that shall be.
pub struct Wanted<'a> {
    /// The pin directory.
    pub pins: &'a Pins,
    /// Cookie of this network namespace.
    pub netns: u64,
    /// Interface index.
    pub device: u32,
    /// Where.
    pub hook: Hook,
    /// What it runs.
    pub program: BorrowedFd<'a>,
    /// The program's name.
    pub name: &'a str,
}

impl Wanted<'_> {
    /// Adopts the filter that is there, or makes one; true if there was none.
    pub fn ensure(&self) -> Result<bool, Error> {
        let Self { device, hook, program, name, .. } = *self;
        let id = sys::program_id(program).map_err(failed("examine"))?;
        let found = clsact::find(device, hook).map_err(failed("examine"))?;
        self.pin(id)?;
        match found {
            Some(filter) if filter.program == id => Ok(false),
            Some(filter) => {
                clsact::replace(device, hook, &filter, program, name).map_err(failed("replace")).map(|()| false)
            }
            None => {
                self.ensure_qdisc()?;
                clsact::add(device, hook, program, name).map_err(failed("attach")).map(|()| true)
            }
        }
    }

    fn pin(&self, id: u32) -> Result<(), pins::Error> {
        let pin = pin(self.pins, self.netns, self.device, self.hook);
        let pinned = sys::open_pin(&pin).and_then(|pinned| sys::program_id(pinned.as_fd()));
        if pinned.is_ok_and(|pinned| pinned == id) { Ok(()) } else { pins::replace(self.program, &pin) }
    }

    fn ensure_qdisc(&self) -> Result<(), Error> {
        let note = note(self.netns, self.device);
        let is_noted = is_noted(self.pins, &note)?;
        self.pins.mark(&note)?;
        let made = clsact::ensure_qdisc(self.device);
        if !is_noted && !matches!(made, Ok(true)) {
            // It is somebody else's.
            self.pins.unmark(&note)?;
        }
        made.map(drop).map_err(failed("attach"))
    }
}

/// The pin that tells of a filter.
pub fn pin(pins: &Pins, netns: u64, device: u32, hook: Hook) -> PathBuf {
    let hook = match hook {
        Hook::Ingress => "ingress",
        Hook::Egress => "egress",
    };
    pins.filters().join(format!("{netns:x}-{device}-{hook}"))
}

/// Where the filter is that a pin tells of. None: it tells of none.
fn hook_of(pin: &Path) -> Option<Hook> {
    let name = pins::file_name(pin)?;
    Hook::ALL.into_iter().zip(["-ingress", "-egress"]).find(|(_, end)| name.ends_with(end)).map(|(hook, _)| hook)
}

/// The note that a device's qdisc was made for our filters.
fn note(netns: u64, device: u32) -> String {
    format!("clsact-{netns:x}-{device}")
}

fn is_noted(pins: &Pins, note: &str) -> Result<bool, pins::Error> {
    Ok(pins.marks()?.iter().any(|other| other == note))
}

/// Removes the filter that a pin tells of, then the pin; with the last one the qdisc, if we made it and nobody else uses it.
/// All of it may be gone, also the device and its namespace.
pub fn remove(pins: &Pins, pin: &Path) -> Result<(), pins::Error> {
    let (Some((netns, device)), Some(hook)) = (pins::device_of(pin), hook_of(pin)) else { return pins::unpin(pin) };
    let note = note(netns, device);
    let is_ours = is_noted(pins, &note)?;
    let removed = namespaces::within(netns, || take_off(device, hook, is_ours)).and_then(Option::transpose);
    // Where there is no namespace there is no qdisc.
    if removed.map_err(at("remove the filter of", pin))?.unwrap_or(true) {
        pins.unmark(&note)?;
    }
    pins::unpin(pin)
}

/// Removes our filter from a device, and its qdisc with the last one if that `is_ours`; true if it was the last one.
fn take_off(device: u32, hook: Hook, is_ours: bool) -> io::Result<bool> {
    if let Some(filter) = clsact::find(device, hook)? {
        clsact::remove(device, hook, &filter)?;
    }
    for hook in Hook::ALL {
        if clsact::find(device, hook)?.is_some() {
            return Ok(false);
        }
    }
    if is_ours {
        clsact::remove_empty_qdisc(device)?;
    }
    Ok(true)
}

/// True if the filter that a pin tells of is there, or in a namespace into which cannot be seen from here.
pub fn is_there(pin: &Path) -> bool {
    let (Some((netns, device)), Some(hook)) = (pins::device_of(pin), hook_of(pin)) else { return false };
    match sys::netns_cookie() {
        Ok(own) if own == netns => clsact::find(device, hook).is_ok_and(|filter| filter.is_some()),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_tell_where_a_filter_is() {
        let pins = Pins::new("/x");
        for hook in Hook::ALL {
            let pin = pin(&pins, 0x1f, 12, hook);
            assert_eq!((pins::device_of(&pin), hook_of(&pin)), (Some((0x1f, 12)), Some(hook)));
        }
        assert_eq!(hook_of(Path::new("/x/links/clsact/1f-12-ingress-next")), None);
    }
}
