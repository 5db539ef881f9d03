//! The lists of differences: documents for people, whose tables are the rows that this suite compares with what it found.
//!
//! A row of a table is a pattern and what either side does there. In a pattern, `*` stands for everything, `A,B` for one
//! of both, and `stem*` for what begins so. Every difference found must be in a row, and every row must have one: a row without is
//! a reason that is no longer true.

use std::collections::{BTreeMap, BTreeSet};

/// Questions, and what kube-proxy and Shunt gave.
pub type Findings = Vec<([String; 5], (String, String))>;

/// One row of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    line: usize,
    pattern: Vec<String>,
    kube_proxy: String,
    shunt: String,
}

impl Row {
    fn holds(&self, words: &[String], kube_proxy: &str, shunt: &str) -> bool {
        let is_meant = |(pattern, word): (&String, &String)| matches(pattern, word);
        self.pattern.iter().zip(words).all(is_meant)
            && matches(&self.kube_proxy, kube_proxy)
            && matches(&self.shunt, shunt)
    }
}

/// True if a pattern stands for a word. A comma is a choice in patterns of single words alone: results are lists with commas.
fn matches(pattern: &str, word: &str) -> bool {
    let one = |pattern: &str| match pattern.strip_suffix('*') {
        Some(stem) => word.starts_with(stem),
        None => word == pattern,
    };
    one(pattern) || (!pattern.contains(' ') && pattern.split(',').any(one))
}

/// Panics unless the differences among the findings are those of the document.
#[track_caller]
pub fn assert_listed(name: &str, document: &str, findings: &Findings) {
    let problems = compare(document, findings);
    assert!(problems.is_empty(), "{} findings and {name} do not agree:\n{}", findings.len(), problems.join("\n"));
}

/// What is not as the document says, one line each.
fn compare(document: &str, findings: &Findings) -> Vec<String> {
    let rows = parse(document);
    let mut idle: BTreeSet<usize> = rows.iter().map(|row| row.line).collect();
    let mut unlisted = Findings::new();
    for (words, (kube_proxy, shunt)) in findings {
        if kube_proxy == shunt {
            continue;
        }
        let held: Vec<_> = rows.iter().filter(|row| row.holds(words, kube_proxy, shunt)).collect();
        idle.retain(|line| held.iter().all(|row| row.line != *line));
        if held.is_empty() {
            unlisted.push((words.clone(), (kube_proxy.clone(), shunt.clone())));
        }
    }
    let mut problems: Vec<_> = condense(unlisted).into_iter().map(|row| format!("not listed: {row}")).collect();
    problems.extend(idle.into_iter().map(|line| format!("no longer true: line {line}")));
    problems
}

/// The rows of all tables of a document; a row under dashes.
fn parse(document: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut is_body = false;
    for (number, line) in document.lines().enumerate() {
        let Some(inner) = line.trim().strip_prefix('|').and_then(|line| line.strip_suffix('|')) else {
            is_body = false;
            continue;
        };
        let mut cells: Vec<String> = inner.split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
        if cells.iter().all(|cell| cell.chars().all(|c| c == '-')) {
            is_body = true;
        } else if is_body {
            let (shunt, kube_proxy) =
                (cells.pop().expect("a row has cells"), cells.pop().expect("a row has two sides"));
            rows.push(Row { line: number + 1, pattern: cells, kube_proxy, shunt });
        }
    }
    rows
}

/// Findings as rows of a table, those together that differ in protocol or family alone.
fn condense(findings: Findings) -> Vec<String> {
    let mut groups: BTreeMap<_, BTreeSet<(String, String)>> = BTreeMap::new();
    for ([client, service, frontend, proto, family], sides) in findings {
        groups.entry((client, service, frontend, sides)).or_default().insert((proto, family));
    }
    let mut rows = Vec::new();
    for ((client, service, frontend, (kube_proxy, shunt)), kinds) in groups {
        let (protos, families): (BTreeSet<_>, BTreeSet<_>) = kinds.iter().cloned().unzip();
        let row = |proto: &str, family: &str| {
            format!("| {client} | {service} | {frontend} | {proto} | {family} | {kube_proxy} | {shunt} |")
        };
        if kinds.len() == protos.len() * families.len() {
            let all = |words: BTreeSet<String>| match words.into_iter().collect::<Vec<_>>().join(",") {
                both if both == "TCP,UDP" || both == "IPv4,IPv6" => "*".to_owned(),
                words => words,
            };
            rows.push(row(&all(protos), &all(families)));
        } else {
            rows.extend(kinds.iter().map(|(proto, family)| row(proto, family)));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# Title\n\nA reason.\n\n| client | service | frontend | protocol | family | kube-proxy | Shunt |\n\
        |---|---|---|---|---|---|---|\n| node-1 | * | node-port@loopback | * | IPv4 | refused | `a from b, c from d` |\n";

    fn finding(client: &str, proto: &str, kube_proxy: &str, shunt: &str) -> ([String; 5], (String, String)) {
        let words = [client, "web", "node-port@loopback", proto, "IPv4"].map(str::to_owned);
        (words, (kube_proxy.to_owned(), shunt.to_owned()))
    }

    #[test]
    fn what_is_equal_needs_no_row_and_what_differs_needs_one() {
        let listed = finding("node-1", "TCP", "refused", "a from b, c from d");
        assert_eq!(compare(DOCUMENT, &vec![listed.clone(), finding("pod", "TCP", "silence", "silence")]), [""; 0]);
        let other = [finding("pod", "TCP", "silence", "refused"), finding("pod", "UDP", "silence", "refused")];
        let found = compare(DOCUMENT, &[vec![listed], other.to_vec()].concat());
        assert_eq!(found, ["not listed: | pod | web | node-port@loopback | * | IPv4 | silence | refused |"]);
    }

    #[test]
    fn a_row_without_a_difference_is_no_longer_true() {
        assert_eq!(
            compare(DOCUMENT, &vec![finding("node-1", "TCP", "refused", "refused")]),
            ["no longer true: line 7"]
        );
        let other_result = finding("node-1", "TCP", "refused", "a from b");
        assert_eq!(compare(DOCUMENT, &vec![other_result]).len(), 2);
    }

    #[test]
    fn choices_and_stems_stand_for_words() {
        assert!(matches("a,b", "b") && matches("node*", "node-1") && matches("*", "x y"));
        assert!(!matches("a,b", "c") && !matches("a from b, c", "c"));
    }
}
