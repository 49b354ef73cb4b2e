//! Where errors go: stderr, and the log that the engine names (runc(8), `--log` and `--log-format`).

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use serde_json::json;

use crate::state::rfc3339;

/// Says what went wrong.
pub fn error(words: &str, log: Option<&Path>, is_json: bool) {
    eprintln!("catalyst-oci: {words}");
    let Some(path) = log else { return };
    // Without a log there is stderr.
    if let Ok(mut file) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = file.write_all(line(words, is_json, SystemTime::now()).as_bytes());
    }
}

fn line(words: &str, is_json: bool, now: SystemTime) -> String {
    let time = rfc3339(now);
    if is_json {
        return format!("{}\n", json!({"level": "error", "msg": words, "time": time}));
    }
    format!("time={time:?} level=error msg={words:?}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_read_a_line_of_json() {
        let text = line("a \"b\"", true, SystemTime::UNIX_EPOCH);
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((read["level"].as_str(), read["msg"].as_str()), (Some("error"), Some("a \"b\"")));
        assert_eq!(read["time"], "1970-01-01T00:00:00.000000000Z");
        assert!(line("x", false, SystemTime::UNIX_EPOCH).contains("level=error msg=\"x\""));
    }
}
