//! `shunt doctor`: every precondition, and what to do about each that fails.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use super::PinArgs;
use super::table::{Format, print_json};
use crate::config::raw::DEFAULT_ADMIN_SOCKET;
use crate::datapath::survey::{self, Unseen};
use crate::doctor::{self, Facts, Finding, Verdict};
use crate::telemetry::admin;

/// What is looked at, and how it is shown.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// The control group that the agent was given [default: the root of cgroup2, as for the agent]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Where a running agent is asked
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET)]
    admin_socket: PathBuf,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Looks, judges and prints.
///
/// Errors: a check has failed, which was printed by then.
pub(super) fn run(args: &DoctorArgs) -> Result<()> {
    let pins = args.pins.pins();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let survey = runtime.context("cannot start the runtime")?.block_on(survey::take(&pins, args.cgroup.clone()));
    let report = match &survey.agent {
        Ok(Some(_)) => admin::ask(&args.admin_socket).map_err(|error| Unseen::because(&error)),
        Ok(None) => Err(Unseen("no agent runs".into())),
        Err(why) => Err(why.into()),
    };
    let findings = doctor::examine(&Facts { survey, report });
    match args.output {
        Format::Json => print_json(&findings)?,
        Format::Table => super::print(&text(&findings))?,
    }
    let failed: Vec<_> = findings.iter().filter(|finding| finding.verdict == Verdict::Failure).collect();
    match failed.len() {
        0 => Ok(()),
        _ => bail!("failed: {}", failed.iter().map(|finding| finding.check).collect::<Vec<_>>().join(", ")),
    }
}

/// A line for what was seen, one below it for what to do; in the end how many there are of each kind.
fn text(findings: &[Finding]) -> String {
    let width = doctor::CHECKS.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let entry = |finding: &Finding| {
        let Finding { check, verdict, seen, advice } = finding;
        let advice = advice.iter().map(|advice| format!("{:9}{:width$}  -> {advice}\n", "", ""));
        format!("{:<9}{check:<width$}  {seen}\n", verdict.name()) + &advice.collect::<String>()
    };
    let counts = Verdict::ALL.iter().filter_map(|verdict| {
        let count = findings.iter().filter(|finding| finding.verdict == *verdict).count();
        (count > 0).then(|| format!("{count} {}", verdict.name()))
    });
    let counts = counts.collect::<Vec<_>>().join(", ");
    findings.iter().map(entry).collect::<String>() + &format!("\n{} checks: {counts}\n", findings.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_stands_below_what_was_seen_and_the_end_counts() {
        let finding = |check, verdict, advice: Option<&str>| Finding {
            check,
            verdict,
            seen: format!("seen of {check}"),
            advice: advice.map(Into::into),
        };
        let findings = [finding("agent", Verdict::Ok, None), finding("forwarding", Verdict::Failure, Some("do it"))];
        let lines: Vec<_> =
            text(&findings).lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        let wanted = [
            "ok agent seen of agent",
            "failure forwarding seen of forwarding",
            "-> do it",
            "",
            "2 checks: 1 failure, 1 ok",
        ];
        assert_eq!(lines, wanted);
    }
}
