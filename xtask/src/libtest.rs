//! What libtest prints, read line by line into counts. Pure: no process, no file.

use std::fmt;

/// What became of a number of tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ran and held.
    pub passed: usize,
    /// Ran and did not hold, or never ended.
    pub failed: usize,
    /// Did not run: ignored, or a need of theirs is not met.
    pub skipped: usize,
}

impl Counts {
    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }

    /// Whether something ran and nothing failed.
    pub fn is_success(self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Reads one test binary's output.
#[derive(Debug, Default)]
pub struct Reader {
    announced: usize,
    seen: Counts,
    results: Vec<Counts>,
    failed: Vec<String>,
}

/// What one test binary's output says.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Of all tests it announced.
    pub counts: Counts,
    /// The names of those that failed, as far as they were printed.
    pub failed: Vec<String>,
}

impl Reader {
    /// Takes in one line, without its line break.
    pub fn line(&mut self, line: &str) {
        if let Some(counts) = parse_result(line) {
            self.results.push(counts);
            (self.announced, self.seen) = (0, Counts::default());
        } else if let Some(count) = parse_announcement(line) {
            self.announced = count;
        } else if let Some(name) = line.strip_prefix("test ") {
            self.test_line(name);
        }
    }

    fn test_line(&mut self, line: &str) {
        if line.ends_with(" ... ok") {
            self.seen.passed += 1;
        } else if let Some(name) = line.strip_suffix(" ... FAILED") {
            self.seen.failed += 1;
            self.failed.push(name.trim_end_matches(" - should panic").to_owned());
        } else if line.contains(" ... ignored") {
            self.seen.skipped += 1;
        }
    }

    /// What the output amounts to, given whether the process ended well.
    ///
    /// A test that was announced and never ended counts as failed, and so does a process that fails without a failed test.
    pub fn finish(mut self, is_success: bool) -> Outcome {
        let mut counts = self.results.iter().copied().fold(Counts::default(), Counts::plus);
        if self.announced > 0 {
            let open = self.announced.saturating_sub(self.seen.passed + self.seen.failed + self.seen.skipped);
            counts = counts.plus(self.seen).plus(Counts { failed: open, ..Counts::default() });
            if open > 0 {
                self.failed.push(format!("({open} that never ended)"));
            }
        }
        if !is_success && counts.failed == 0 {
            counts.failed = 1;
            self.failed.push("(the process itself)".to_owned());
        }
        Outcome { counts, failed: self.failed }
    }
}

/// `running 3 tests`
fn parse_announcement(line: &str) -> Option<usize> {
    let rest = line.strip_prefix("running ")?;
    rest.strip_suffix(" tests").or_else(|| rest.strip_suffix(" test"))?.parse().ok()
}

/// `test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn parse_result(line: &str) -> Option<Counts> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| rest.split("; ").find_map(|part| part.strip_suffix(word)?.trim().parse().ok());
    Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

/// The number of tests in what `--list --format terse` prints.
pub fn count_listed(list: &str) -> usize {
    list.lines().filter(|line| line.ends_with(": test")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 4 tests
test a::one ... ok
test a::two ... FAILED
test b ... ignored, needs a moon
test c - should panic ... ok

failures:

---- a::two stdout ----
test result: of something printed by the test itself

failures:
    a::two

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn read(output: &str, is_success: bool) -> Outcome {
        let mut reader = Reader::default();
        output.lines().for_each(|line| reader.line(line));
        reader.finish(is_success)
    }

    #[test]
    fn counts_come_from_the_result_line_and_names_from_the_tests() {
        let outcome = read(OUTPUT, false);
        assert_eq!(outcome.counts, Counts { passed: 2, failed: 1, skipped: 1 });
        assert_eq!(outcome.failed, ["a::two"]);
    }

    #[test]
    fn several_results_of_one_process_add_up() {
        let two = format!(
            "{OUTPUT}\nrunning 1 test\ntest x ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured"
        );
        assert_eq!(read(&two, false).counts, Counts { passed: 3, failed: 1, skipped: 1 });
    }

    #[test]
    fn a_crash_fails_every_test_that_did_not_end() {
        let outcome = read("running 3 tests\ntest one ... ok\n", false);
        assert_eq!(outcome.counts, Counts { passed: 1, failed: 2, skipped: 0 });
        assert_eq!(outcome.failed, ["(2 that never ended)"]);
    }

    #[test]
    fn a_process_that_fails_without_a_failed_test_is_a_failure() {
        assert_eq!(read("", false).counts.failed, 1);
        assert_eq!(read("test result: ok. 1 passed; 0 failed; 0 ignored;", false).counts.failed, 1);
        assert_eq!(read("", true).counts, Counts::default());
    }

    #[test]
    fn last_line_has_its_fixed_shape() {
        let counts = Counts { passed: 12, failed: 0, skipped: 3 };
        assert_eq!(counts.to_string(), "12 passed, 0 failed, 3 skipped");
        assert!(counts.is_success() && !Counts::default().is_success());
    }

    #[test]
    fn listed_tests_are_counted() {
        assert_eq!(count_listed("a::b: test\nc: test\nd: benchmark\n\n2 tests, 1 benchmark\n"), 2);
    }
}
