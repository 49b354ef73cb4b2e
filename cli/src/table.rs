//! Aligned columns.

use crate::text::clean;

/// A colour of meaning, not of taste.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// As the terminal has it.
    #[default]
    Plain,
    /// Works (green).
    Good,
    /// Works badly (yellow).
    Warn,
    /// Does not work (red).
    Bad,
    /// At rest, or a heading (dim).
    Faint,
}

/// `text` in its tone, if colours are wanted.
pub fn paint(text: &str, tone: Tone, colours: bool) -> String {
    let code = match tone {
        _ if !colours || text.is_empty() => return text.to_owned(),
        Tone::Plain => return text.to_owned(),
        Tone::Good => "32",
        Tone::Warn => "33",
        Tone::Bad => "31",
        Tone::Faint => "2",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// One field.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A field in a tone.
    pub fn toned(text: impl AsRef<str>, tone: Tone) -> Self {
        Self { text: clean(text.as_ref()), tone }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// Rows under a heading; columns are as wide as their widest field.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table with these column headings.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| Cell::toned(heading, Tone::Faint)).collect()] }
    }

    /// A table without headings: name and value.
    pub fn pairs() -> Self {
        Self { rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// Adds a name and its value.
    pub fn pair(&mut self, name: &str, value: impl Into<Cell>) {
        self.rows.push(vec![Cell::toned(name, Tone::Faint), value.into()]);
    }

    /// The table as text, each row ended by a newline; no spaces at the ends of lines.
    pub fn render(&self, colours: bool) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let texts = self.rows.iter().filter_map(|row| row.get(column));
            texts.map(|cell| cell.text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let last = row.iter().rposition(|cell| !cell.text.is_empty()).unwrap_or(0);
            for (column, cell) in row.iter().enumerate().take(last + 1) {
                text.push_str(&paint(&cell.text, cell.tone, colours));
                if column < last {
                    text.push_str(&" ".repeat(widths[column] - cell.text.chars().count() + 2));
                }
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_clean() {
        let mut table = Table::new(&["ID", "STATE", "TAGS"]);
        table.row(vec!["web1".into(), Cell::toned("powered on", Tone::Good), "".into()]);
        table.row(vec!["x".into(), "off".into(), "a, b".into()]);
        assert_eq!(table.render(false), "ID    STATE       TAGS\nweb1  powered on\nx     off         a, b\n");
    }

    #[test]
    fn colours_do_not_disturb_the_columns() {
        let mut table = Table::pairs();
        table.pair("State", Cell::toned("on", Tone::Good));
        assert_eq!(table.render(true), "\x1b[2mState\x1b[0m  \x1b[32mon\x1b[0m\n");
    }

    #[test]
    fn a_field_cannot_break_its_row() {
        let mut table = Table::pairs();
        table.pair("Name", "a\nb\x1b[2J");
        assert_eq!(table.render(false), "Name  a b [2J\n");
    }
}
