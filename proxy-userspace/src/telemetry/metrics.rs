//! Metrics: the registry as text, in the form that a scraper asks for.
//!
//! The registry is made once and passed down; each part registers its own metrics. May touch: nothing.

use std::fmt;
use std::fmt::Write as _;
use std::sync::Arc;

use hyper::StatusCode;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;
use tokio::sync::Mutex;
use tracing::error;

use super::http::Answer;

/// A text form of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Prometheus text format 0.0.4, which everything reads.
    Classic,
    /// OpenMetrics 1.0, for those who name it.
    OpenMetrics,
}

impl Form {
    /// From the header Accept.
    fn wanted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Classic }
    }

    const fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    fn encode(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, registry)?;
        match self {
            Self::Classic => Ok(classic(&text)),
            Self::OpenMetrics => encode_eof(&mut text).map(|()| text),
        }
    }
}

/// OpenMetrics text of counters, gauges and histograms in the older form: there the name of a counter ends in `_total` in
/// its description too.
fn classic(text: &str) -> String {
    let mut classic = String::with_capacity(text.len() + text.len() / 16);
    let mut help = "";
    for line in text.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            classic.push_str(line);
            classic.push('\n');
            continue;
        };
        // HELP stands before TYPE; UNIT is not known here.
        match comment.split_once(' ') {
            Some(("HELP", rest)) => help = rest,
            Some(("TYPE", rest)) => describe(&mut classic, help, rest),
            _ => {}
        }
    }
    classic
}

fn describe(classic: &mut String, help: &str, name_and_kind: &str) {
    let Some((name, kind)) = name_and_kind.split_once(' ') else { return };
    let help = help.split_once(' ').map_or("", |(_, help)| help);
    let suffix = if kind == "counter" { "_total" } else { "" };
    let _ = writeln!(classic, "# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}");
}

/// Answers with metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Scrapes come one after the other: many at once are no reason to keep every core busy.
    turn: Mutex<()>,
}

impl Metrics {
    /// Of a registry that is complete.
    pub fn new(registry: Registry) -> Self {
        Self { registry: Arc::new(registry), turn: Mutex::default() }
    }

    /// For a client that names its form in the header Accept.
    pub async fn answer(&self, accept: &str) -> Answer {
        let form = Form::wanted(accept);
        let _turn = self.turn.lock().await;
        let registry = self.registry.clone();
        // Tables are read in there.
        let text = tokio::task::spawn_blocking(move || form.encode(&registry)).await;
        match text {
            Ok(Ok(body)) => Answer { content_type: form.content_type(), ..Answer::text(StatusCode::OK, body) },
            Ok(Err(_)) | Err(_) => {
                error!("metrics cannot be written");
                Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be written\n")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;
    use prometheus_client::metrics::family::Family;
    use prometheus_client::metrics::gauge::Gauge;
    use prometheus_client::metrics::histogram::Histogram;

    use super::*;

    fn registry() -> Registry {
        let mut registry = Registry::default();
        let family = Family::<[(&'static str, &'static str); 1], Counter>::default();
        family.get_or_create(&[("name", "a # \"b\"\n")]).inc_by(2);
        registry.register("things", "Things seen", family);
        registry.register("level", "Level", Gauge::<i64>::default());
        registry.register("wait_seconds", "Wait", Histogram::new([0.5]));
        registry
    }

    async fn ask(accept: &str) -> Answer {
        Metrics::new(registry()).answer(accept).await
    }

    #[tokio::test]
    async fn everybody_gets_the_classic_form_with_counters_by_their_full_name() {
        let answer = ask("text/plain;version=0.0.4, */*").await;
        assert_eq!(answer.content_type, "text/plain; version=0.0.4; charset=utf-8");
        let expected = concat!(
            "# HELP things_total Things seen.\n# TYPE things_total counter\n",
            "things_total{name=\"a # \\\"b\\\"\\n\"} 2\n",
            "# HELP level Level.\n# TYPE level gauge\nlevel 0\n",
            "# HELP wait_seconds Wait.\n# TYPE wait_seconds histogram\n",
            "wait_seconds_sum 0.0\nwait_seconds_count 0\n",
            "wait_seconds_bucket{le=\"0.5\"} 0\nwait_seconds_bucket{le=\"+Inf\"} 0\n",
        );
        assert_eq!(answer.body, expected);
    }

    #[tokio::test]
    async fn who_names_open_metrics_gets_it() {
        let accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5";
        let answer = ask(accept).await;
        assert_eq!(answer.content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
        assert!(answer.body.starts_with("# HELP things Things seen.\n# TYPE things counter\nthings_total{"));
        assert!(answer.body.ends_with("# EOF\n"));
    }
}
