//! The power button: whoever presses it wants the guest to shut down, and in lumen nobody else listens for it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;

use catalyst_agent_protocol::ShutdownKind;

use crate::shutdown;

/// What Linux calls the button of ACPI (drivers/acpi/button.c).
const NAME: &str = "Power Button";
/// `struct input_event` on 64-bit machines: time, type, code, value (linux/input.h).
const EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Shuts the guest down when the button is pressed, for as long as the agent lives. A machine without a button is none
/// the worse.
pub fn watch() {
    let Some(path) = find(Path::new("/sys/class/input"), Path::new("/dev/input")) else { return };
    thread::spawn(move || match wait(&path) {
        Ok(()) => shutdown::ask_init(ShutdownKind::PowerOff),
        Err(error) => eprintln!("catalyst-agent: the power button {} failed: {error}", path.display()),
    });
}

/// The button's device; the initrd has loaded its driver.
fn find(class: &Path, devices: &Path) -> Option<PathBuf> {
    fs::read_dir(class).ok()?.flatten().map(|entry| entry.file_name()).find_map(|name| {
        let told = fs::read_to_string(class.join(&name).join("device/name")).ok()?;
        let is_button = name.to_str()?.starts_with("event") && told.trim_end() == NAME;
        is_button.then(|| devices.join(name))
    })
}

/// Returns when the button is pressed.
fn wait(path: &Path) -> io::Result<()> {
    let mut device = File::open(path)?;
    let mut event = [0; EVENT_SIZE];
    loop {
        device.read_exact(&mut event)?;
        if is_press(&event) {
            return Ok(());
        }
    }
}

fn is_press(event: &[u8; EVENT_SIZE]) -> bool {
    let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    (half(16), half(18), half(20)) == (EV_KEY, KEY_POWER, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_button_is_found_among_other_inputs() {
        let class = tempfile::tempdir().unwrap();
        for (name, told) in [("event0", "Sleep Button"), ("event1", NAME), ("input3", NAME)] {
            let folder = class.path().join(name).join("device");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("name"), format!("{told}\n")).unwrap();
        }
        let found = find(class.path(), Path::new("/dev/input"));
        assert_eq!(found, Some(PathBuf::from("/dev/input/event1")));
        assert_eq!(find(Path::new("/nonexistent"), Path::new("/dev/input")), None);
    }

    #[test]
    fn a_press_is_told_from_a_release_and_from_the_end_of_a_report() {
        let event = |kind: u16, code: u16, value: u16| {
            let mut bytes = [0; EVENT_SIZE];
            for (at, half) in [(16, kind), (18, code), (20, value)] {
                bytes[at..at + 2].copy_from_slice(&half.to_ne_bytes());
            }
            bytes
        };
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        for (kind, code, value) in [(EV_KEY, KEY_POWER, 0), (0, 0, 0), (EV_KEY, 30, 1)] {
            assert!(!is_press(&event(kind, code, value)));
        }
    }
}
