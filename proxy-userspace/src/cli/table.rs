//! Lists as people read them, and as programs do.

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

/// Form of the output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Columns
    #[default]
    Table,
    /// JSON
    Json,
}

/// One line of a list.
pub(super) trait Row: Serialize {
    /// Titles of the columns.
    const TITLES: &'static [&'static str];

    /// The cells of this line; as many as there are titles.
    fn cells(&self) -> Vec<String>;
}

/// Prints a list.
pub(super) fn print_rows<R: Row>(rows: &[R], format: Format) -> Result<()> {
    match format {
        Format::Json => print_json(&rows),
        Format::Table => super::print(&text(R::TITLES, rows.iter().map(Row::cells))),
    }
}

/// Prints a value as JSON.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    super::print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Columns as wide as their widest cell. The last one is not filled up.
pub(super) fn text(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = titles.iter().map(ToString::to_string).collect();
    let lines: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let line = |cells: &Vec<String>| {
        let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    lines.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), String::new()]];
        assert_eq!(text(&["NAME", "N"], rows.into_iter()), "NAME  N\na     1\nlong\n");
    }
}
