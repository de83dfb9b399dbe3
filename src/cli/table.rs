//! Text in columns.

use std::iter::repeat_n;

use super::text::printable;

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows under a header, as lines that begin with `indent`.
pub(super) fn table(indent: &str, header: &[(&str, Align)], rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell).into_owned()).collect()).collect();
    let width = |column: usize, title: &str| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([title.chars().count()]).max().unwrap_or_default()
    };
    let columns: Vec<(usize, Align)> =
        header.iter().enumerate().map(|(column, (title, align))| (width(column, title), *align)).collect();
    let titles: Vec<String> = header.iter().map(|(title, _)| (*title).to_owned()).collect();
    let line = |row: &Vec<String>| {
        let mut line = indent.to_owned();
        for (cell, (width, align)) in row.iter().zip(&columns) {
            let padding: String = repeat_n(' ', width.saturating_sub(cell.chars().count())).collect();
            match align {
                Align::Left => line.extend([cell, &padding, "  "]),
                Align::Right => line.extend([&padding, cell, "  "]),
            }
        }
        line.trim_end().to_owned()
    };
    std::iter::once(&titles).chain(&rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_below_each_other() {
        let rows = [vec!["a\n".to_owned(), "1".to_owned()], vec!["größe".to_owned(), "100".to_owned()]];
        let text = table("  ", &[("NAME", Align::Left), ("N", Align::Right)], &rows);
        assert_eq!(text, ["  NAME     N", "  a\\n      1", "  größe  100"]);
    }
}
