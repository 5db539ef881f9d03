//! Measurements, as ratios in one run: what is compared takes turns, round by round, so that a noisy machine is noisy for
//! both. (What two nodes differ by without Shunt is measured once, before it, and shown.) Nothing here is asserted; a row
//! that falls short of its goal says so.
//!
//! | module | measures |
//! |---|---|
//! | [`load`] | connections and transfers, from a process in its place |
//! | [`path`] | through a service, beside the pod directly; traffic that is nobody's service, beside a node without Shunt |
//! | [`program`] | nanoseconds a packet of the programs themselves, by test-run |
//! | [`control`] | the agent: start with many services, one change among them, memory |
//! | [`api`] | a list of many services, as an API server gives it |
//! | [`rivals`] | connections, changes and the load of many services, beside the real kube-proxy in both its modes |

mod api;
mod control;
mod load;
mod path;
mod program;
mod rivals;

use std::env;

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What is measured, beside what.
    pub what: String,
    /// The goal, in words.
    pub goal: &'static str,
    /// What was found, in words.
    pub found: String,
    /// Whether that reaches the goal; `None` if there is nothing to reach.
    pub reached: Option<bool>,
}

impl Row {
    /// A ratio that should be at most `limit`.
    fn ratio(what: impl Into<String>, goal: &'static str, limit: f64, ratio: f64) -> Self {
        Self { what: what.into(), goal, found: format!("{ratio:.3} times"), reached: Some(ratio <= limit) }
    }

    /// Something that explains other rows and has no goal of its own.
    fn note(what: String, found: String) -> Self {
        Self { what, goal: "", found, reached: None }
    }

    /// Something that could not be measured, and why.
    fn missing(what: String, goal: &'static str, why: &str) -> Self {
        Self { what, goal, found: format!("not measured: {why}"), reached: None }
    }
}

const HELP: &str = "\
Prints what Shunt costs, as ratios within one run (about six minutes, and twenty more for rivals).

Usage: cargo xtask bench [-- OPTIONS] [GROUP...]

Groups: path (connections, transfers, foreign traffic), program (nanoseconds a packet, beside C),
        control (the agent: processor time, memory, one change),
        rivals (beside kube-proxy in modes iptables and nftables, on a real control plane: connections,
        from a slice's write to the first connection, cold load, memory)
Options:
  --rounds N      rounds of every comparison; more are steadier [default: 7]
  --services N,…  numbers of services to measure with [default: 10,1000,10000]
";

/// What was asked for.
#[derive(Debug)]
struct Options {
    rounds: usize,
    services: Vec<usize>,
    groups: Vec<String>,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self { rounds: 7, services: vec![10, 1000, 10_000], groups: vec![] };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--rounds" => options.rounds = number(&value()?)?,
                "--services" => options.services = value()?.split(',').map(number).collect::<Result<_, _>>()?,
                "path" | "program" | "control" | "rivals" => options.groups.push(word),
                other => return Err(format!("what is {other:?}?\n\n{HELP}")),
            }
        }
        Ok(options)
    }

    fn wants(&self, group: &str) -> bool {
        self.groups.is_empty() || self.groups.iter().any(|wanted| wanted == group)
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

/// The whole program; it is also its own measuring process.
pub fn main() {
    let mut words = env::args().skip(1).peekable();
    match words.peek().map(String::as_str) {
        Some(load::MEASURE) => load::measure(),
        Some(load::SERVE) => load::serve(),
        Some("--help" | "-h") => print!("{HELP}"),
        _ => match Options::parse(words) {
            Ok(options) => run(&options),
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(64);
            }
        },
    }
}

fn run(options: &Options) {
    let mut rows = Vec::new();
    if options.wants("program") {
        rows.extend(program::rows(options.rounds));
    }
    if options.wants("path") {
        rows.extend(path::rows(options.rounds, &options.services));
    }
    if options.wants("control") {
        rows.extend(control::rows(options.services.iter().copied().max().unwrap_or(10_000)));
    }
    if options.wants("rivals") {
        rows.extend(rivals::rows(options.rounds, &options.services));
    }
    print!("\n{}", table(&rows));
}

/// The rows, lined up.
fn table(rows: &[Row]) -> String {
    let verdict = |row: &Row| match row.reached {
        Some(true) => "reached",
        Some(false) => "NOT reached",
        None => "",
    };
    let width = |cell: fn(&Row) -> usize| rows.iter().map(cell).max().unwrap_or_default();
    let (what, found) = (width(|row| row.what.chars().count()), width(|row| row.found.chars().count()));
    let line = |name: &str, number: &str, goal: &str, verdict: &str| {
        format!("{name:what$}  {number:>found$}  {goal:31}  {verdict}").trim_end().to_owned() + "\n"
    };
    let head = line("WHAT", "FOUND", "GOAL", "");
    head + &rows.iter().map(|row| line(&row.what, &row.found, row.goal, verdict(row))).collect::<String>()
}

/// The middle of some numbers.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_wrong_ones_named() {
        let parse = |text: &str| Options::parse(text.split_whitespace().map(str::to_owned));
        let options = parse("--rounds 3 path --services 1,20").expect("right");
        assert_eq!((options.rounds, options.services.as_slice()), (3, [1, 20].as_slice()));
        assert!(options.wants("path") && !options.wants("control"));
        assert!(parse("").expect("right").wants("control"));
        assert!(parse("--rounds x").unwrap_err().contains("\"x\""));
        assert!(parse("paths").unwrap_err().contains("paths"));
    }

    #[test]
    fn the_table_says_what_falls_short() {
        let rows = [Row::ratio("a", "at most 2", 2.0, 1.5), Row::ratio("b", "at most 2", 2.0, 2.5)];
        let rows = table(&[rows.into(), vec![Row::missing("c".into(), "at most 2", "no clang")]].concat());
        let ends: Vec<_> = rows.lines().map(|line| line.rsplit("  ").next().unwrap_or_default()).collect();
        assert_eq!(ends, ["GOAL", "reached", "NOT reached", "at most 2"]);
        assert!(rows.contains("not measured: no clang"));
    }

    #[test]
    fn the_middle_is_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
    }
}
