//! Text from elsewhere, made fit for a terminal; durations and dates.

use std::time::{SystemTime, UNIX_EPOCH};

/// `text` on one line: control characters become spaces. For values that guests and files
/// have a hand in.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Takes from a byte stream what could drive a terminal: of control characters only newline,
/// tab and carriage return stay, of escape sequences only colours (`ESC [ … m`).
/// Keeps its state between chunks.
#[derive(Debug, Default)]
pub struct TerminalFilter {
    state: FilterState,
    held: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum FilterState {
    #[default]
    Text,
    /// After byte C2, which in UTF-8 begins the control characters U+0080 to U+009F.
    Latin,
    Escape,
    Csi,
    /// Inside a string sequence (OSC, DCS, APC, PM): ends at BEL or ESC \.
    Skip,
    SkipEscape,
}

/// Longest colour sequence that is kept, in bytes.
const MAX_COLOUR: usize = 32;

impl TerminalFilter {
    /// What of `chunk` may be shown.
    pub fn pass(&mut self, chunk: &[u8]) -> Vec<u8> {
        let mut shown = Vec::with_capacity(chunk.len());
        for &byte in chunk {
            self.step(byte, &mut shown);
        }
        shown
    }

    fn step(&mut self, byte: u8, shown: &mut Vec<u8>) {
        self.state = match (self.state, byte) {
            // Intermediate bytes (ESC ( B and the like) are followed by one more.
            (FilterState::Text | FilterState::Escape | FilterState::Csi, 0x1b)
            | (FilterState::Escape, 0x20..=0x2f) => FilterState::Escape,
            (FilterState::Text, 0xc2) => FilterState::Latin,
            (FilterState::Latin, 0xa0..=0xbf) => {
                shown.extend_from_slice(&[0xc2, byte]);
                FilterState::Text
            }
            // No sequence goes beyond its line: one that was cut off must not hide what follows.
            (FilterState::Text, b'\n' | b'\t' | b'\r' | 0x20..=0x7e | 0x80..)
            | (FilterState::Skip | FilterState::SkipEscape | FilterState::Csi, b'\n') => {
                shown.push(byte);
                FilterState::Text
            }
            (FilterState::Escape, b'[') => {
                self.held.clear();
                FilterState::Csi
            }
            (FilterState::Escape, b']' | b'P' | b'_' | b'^' | b'X') => FilterState::Skip,
            (FilterState::Csi, 0x20..=0x3f) => {
                self.held.push(byte);
                FilterState::Csi
            }
            (FilterState::Csi, _) => {
                if byte == b'm'
                    && self.held.len() <= MAX_COLOUR
                    && self.held.iter().all(|&byte| is_colour(byte))
                {
                    shown.extend_from_slice(b"\x1b[");
                    shown.append(&mut self.held);
                    shown.push(b'm');
                }
                FilterState::Text
            }
            (FilterState::Text | FilterState::Latin | FilterState::Escape, _)
            | (FilterState::Skip, 0x07)
            | (FilterState::SkipEscape, b'\\') => FilterState::Text,
            (FilterState::Skip | FilterState::SkipEscape, 0x1b) => FilterState::SkipEscape,
            (FilterState::Skip | FilterState::SkipEscape, _) => FilterState::Skip,
        };
        self.held.truncate(MAX_COLOUR + 1);
    }
}

const fn is_colour(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == b';'
}

/// Seconds as people say them: `45 s`, `3 min`, `5 h 12 min`, `9 d 3 h`.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// Seconds since 1970 as `2026-01-31 12:00:00 UTC`.
pub fn date(seconds: u64) -> String {
    let (year, month, day) = civil(seconds / 86_400);
    let second = seconds % 86_400;
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// The Gregorian date of a number of days since 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut rest = days;
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        // A clock set to the end of time must not be counted year by year.
        if rest < length || year >= 9999 {
            break;
        }
        rest -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest.min(30) + 1)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Seconds from `then` (seconds since 1970) to now; 0 for the future.
pub fn since(then: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    now.saturating_sub(then)
}

/// `word` as a shell reads it back: quoted where it needs to be.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@+,%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_a_line() {
        assert_eq!(clean("a\x1b[2Jb\nc"), "a [2Jb c");
    }

    #[test]
    fn the_filter_keeps_text_and_colours_only() {
        let mut filter = TerminalFilter::default();
        let shown = filter
            .pass(b"\x1b[1;32mok\x1b[0m\x1b[2J\x1b[6n\x1b]0;title\x07x\x1b]52;c;AA\x1b\\y\x07\x1b(Bz\r\n");
        assert_eq!(shown, b"\x1b[1;32mok\x1b[0mxyz\r\n");
    }

    #[test]
    fn control_characters_beyond_ascii_go_and_letters_stay() {
        let shown = TerminalFilter::default().pass("\u{9b}2Jä ©\u{9d}0;t\u{9c}€".as_bytes());
        assert_eq!(String::from_utf8(shown).unwrap(), "2Jä ©0;t€");
    }

    #[test]
    fn the_filter_is_not_fooled_by_chunks() {
        let input = b"a\x1b]0;t\x1b[31m\x07b\x1b[31mc\x1b[?25ld";
        let mut filter = TerminalFilter::default();
        let shown: Vec<u8> = input.iter().flat_map(|&byte| filter.pass(&[byte])).collect();
        assert_eq!(shown, b"ab\x1b[31mcd");
    }

    #[test]
    fn a_sequence_that_was_cut_off_hides_no_further_line() {
        assert_eq!(TerminalFilter::default().pass(b"a\x1b]0;half\nb\x1b[1\nc"), b"a\nb\nc");
    }

    #[test]
    fn an_endless_sequence_is_bounded() {
        let mut filter = TerminalFilter::default();
        assert!(filter.pass(b"\x1b[").is_empty());
        for _ in 0..100 {
            assert!(filter.pass(&[b'1'; 1000]).is_empty());
        }
        assert!(filter.held.len() <= MAX_COLOUR + 1);
        assert!(filter.pass(b"m").is_empty());
    }

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (1_798_761_599, "2026-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(date(seconds), text);
        }
        assert!(date(u64::MAX).starts_with("9999-"));
    }

    #[test]
    fn durations_are_short() {
        for (seconds, text) in
            [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn shell_words_survive_a_shell() {
        assert_eq!(shell_word("/usr/bin/x"), "/usr/bin/x");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
