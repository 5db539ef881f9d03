//! `shunt-probe JOB`: servers and load generators in a process of their own, so that they can have a control group of
//! their own. JOB is JSON, see `shunt_tests::probe::Job`: `shunt-probe '{"tcp_once":{"to":"10.96.0.1:80"}}'`.
//!
//! Reports are printed as lines of JSON. A running load prints its statistics when it reads the line `stats`; it ends when
//! its standard input ends.

use std::process::ExitCode;

use shunt_tests::probe;

fn main() -> ExitCode {
    let Some(job) = std::env::args().nth(1) else {
        eprintln!(
            "usage: shunt-probe JOB, where JOB is JSON, for example {{\"tcp_once\":{{\"to\":\"10.96.0.1:80\"}}}}"
        );
        return ExitCode::from(64);
    };
    match serde_json::from_str(&job) {
        Ok(job) => {
            probe::run(job);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("not a job: {error}");
            ExitCode::from(64)
        }
    }
}
