//! Makes the linker's complaints readable: one program that is too large for its stack yields thousands of lines that
//! differ in their place only. Pure: lines in, lines out.

use std::collections::HashMap;

/// How many places of one complaint are shown.
const SHOWN: usize = 3;

/// Drops what repeats in a build's messages.
#[derive(Debug, Default)]
pub struct Condenser {
    counts: HashMap<String, usize>,
    dropped: usize,
    is_after_dropped: bool,
}

impl Condenser {
    /// Whether the line is to be shown.
    pub fn keep(&mut self, line: &str) -> bool {
        let Some(complaint) = complaint(line) else {
            // The linker pads its complaints with empty lines.
            return !(self.is_after_dropped && line.trim().is_empty());
        };
        let count = self.counts.entry(complaint.to_owned()).or_default();
        *count += 1;
        self.is_after_dropped = *count > SHOWN;
        self.dropped += usize::from(self.is_after_dropped);
        !self.is_after_dropped
    }

    /// A line on what was dropped, if anything was.
    pub fn summary(&self) -> Option<String> {
        (self.dropped > 0)
            .then(|| format!("({} more of the linker's complaints, alike but for their places)", self.dropped))
    }
}

/// What the linker says of a function, without the place:
/// `ERROR llvm: src/packet.rs:41:18: in function NAME i32 (ptr): Looks like ...`.
fn complaint(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("ERROR llvm: ")?;
    Some(rest.find(" in function ").map_or(rest, |at| &rest[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_alike_but_for_their_place_are_shown_three_times() {
        let mut condenser = Condenser::default();
        let of = |function: &str, line: usize| {
            format!("  ERROR llvm: a.rs:{line}:1: in function {function} i32 (ptr): too big")
        };
        let kept = (0..50).filter(|line| condenser.keep(&of("f", *line))).count();
        assert_eq!(kept, 3);
        assert!(!condenser.keep("   "));
        assert!(condenser.keep(&of("g", 1)));
        assert!(condenser.keep("") && condenser.keep("error: could not compile"));
        assert!(condenser.summary().expect("some were dropped").starts_with("(47 more"));
    }

    #[test]
    fn nothing_dropped_needs_no_summary() {
        let mut condenser = Condenser::default();
        assert!(["", "warning: x", ""].iter().all(|line| condenser.keep(line)));
        assert_eq!(condenser.summary(), None);
    }
}
