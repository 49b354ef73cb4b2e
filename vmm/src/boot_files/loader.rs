//! What a loader's configuration starts: the part of GRUB's `grub.cfg` that installers write (GRUB manual, "Writing full
//! configuration files directly"). Conditions are not evaluated and variables not expanded; words with variables are left out.

/// Longest line of words that is taken for an entry, in words.
const MAX_WORDS: usize = 256;
/// Most entries.
const MAX_ENTRIES: usize = 256;

/// Something that can be started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The kernel's path in the file system that the loader reads.
    pub kernel: String,
    /// Initial RAM disks, which are put together.
    pub initrds: Vec<String>,
    /// The rest of the kernel's command line.
    pub options: Vec<String>,
    /// What people choose it by.
    pub title: String,
    /// What configurations choose it by.
    pub id: String,
    /// Its number in its menu, and before it those of the menus around.
    pub place: Vec<usize>,
}

/// A menu that is open while its lines are read.
enum Block {
    /// A submenu: what it is called, and the number of the next entry in it.
    Menu { place: Vec<usize>, next: usize },
    /// An entry.
    Entry(Box<Entry>),
    /// Something else with braces or an `fi`.
    Other,
}

/// What `grub.cfg` starts if nobody chooses; `saved` is what GRUB keeps as `saved_entry`.
pub fn chosen(config: &str, saved: Option<&str>) -> Option<Entry> {
    let (entries, default) = entries(config);
    let default = match default.as_deref() {
        Some(named) if named.contains("saved_entry") => saved,
        Some(named) if named.contains('$') => None,
        named => named,
    };
    let named = default.and_then(|default| entries.iter().find(|entry| entry.is_called(default)));
    named.or_else(|| entries.first()).cloned()
}

/// What GRUB's environment block has of a name.
pub fn environment(block: &str, name: &str) -> Option<String> {
    block
        .lines()
        .find_map(|line| line.split_once('=').filter(|(key, _)| *key == name))
        .map(|(_, value)| value.to_owned())
}

impl Entry {
    /// Whether `default=` means it: numbers, titles or ids, from the outermost menu inwards, with `>` between.
    fn is_called(&self, default: &str) -> bool {
        let numbers: Option<Vec<usize>> = default.split('>').map(|part| part.trim().parse().ok()).collect();
        if numbers.is_some_and(|numbers| numbers == self.place) {
            return true;
        }
        let last = default.rsplit('>').next().unwrap_or(default).trim();
        !last.is_empty() && (last == self.title || last == self.id)
    }
}

fn entries(config: &str) -> (Vec<Entry>, Option<String>) {
    let mut found = Vec::new();
    let mut default = None;
    let mut blocks: Vec<Block> = Vec::new();
    let mut top = 0;
    // What is started without a menu.
    let mut bare = Entry::default();
    for line in config.lines() {
        let words = words(line);
        let Some(first) = words.first().map(String::as_str) else { continue };
        match first {
            "menuentry" | "submenu" => {
                let place = next_place(&mut blocks, &mut top);
                if words.last().is_some_and(|last| last == "}") {
                    // One line, as for what starts no kernel.
                    continue;
                }
                let block = if first == "submenu" {
                    Block::Menu { place, next: 0 }
                } else {
                    let title = words.get(1).cloned().unwrap_or_default();
                    let id =
                        words.iter().position(|word| word.ends_with("menuentry_id_option") || word == "--id");
                    let id = id.and_then(|at| words.get(at + 1)).cloned().unwrap_or_default();
                    Block::Entry(Box::new(Entry { title, id, place, ..Entry::default() }))
                };
                blocks.push(block);
            }
            "}" => match blocks.pop() {
                Some(Block::Entry(entry)) if !entry.kernel.is_empty() && found.len() < MAX_ENTRIES => {
                    found.push(*entry);
                }
                _ => {}
            },
            _ if words.last().is_some_and(|last| last == "{") => blocks.push(Block::Other),
            "set" => {
                let value = words.get(1).and_then(|word| word.strip_prefix("default="));
                default = value.map(str::to_owned).filter(|value| !value.contains("next_entry")).or(default);
            }
            _ => {
                let entry = blocks.iter_mut().rev().find_map(|block| match block {
                    Block::Entry(entry) => Some(&mut **entry),
                    _ => None,
                });
                command(&words, entry.unwrap_or(&mut bare));
            }
        }
    }
    if found.is_empty() && !bare.kernel.is_empty() {
        found.push(bare);
    }
    (found, default)
}

/// The place of an entry that begins where these blocks are open.
fn next_place(blocks: &mut [Block], top: &mut usize) -> Vec<usize> {
    let menu = blocks.iter_mut().rev().find_map(|block| match block {
        Block::Menu { place, next } => Some((place.clone(), next)),
        _ => None,
    });
    let (mut place, next) = menu.unwrap_or((Vec::new(), top));
    place.push(*next);
    *next += 1;
    place
}

fn command(words: &[String], entry: &mut Entry) {
    let plain = |word: &&String| !word.contains('$');
    match words[0].as_str() {
        "linux" | "linux16" | "linuxefi" => {
            let mut words = words[1..].iter().filter(plain).cloned();
            entry.kernel = words.next().unwrap_or_default();
            entry.options = words.collect();
        }
        "initrd" | "initrd16" | "initrdefi" => {
            entry.initrds = words[1..].iter().filter(plain).cloned().collect();
        }
        _ => {}
    }
}

/// The words of a line, as GRUB's shell has them: quotes and backslashes, and what comes after `#` is a comment.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (None, '#') if word.is_none() => break,
            (None, ' ' | '\t' | '\r' | ';') => words.extend(word.take()),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(letter);
            }
            (Some(open), letter) if letter == open => quote = None,
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(letters.next()),
            // Nothing that could pass for the end of a command line.
            (_, letter) if letter.is_control() => {}
            (_, letter) => word.get_or_insert_default().push(letter),
        }
        if words.len() >= MAX_WORDS {
            return words;
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = r#"
set default="0"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="0"
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	search --no-floppy --fs-uuid --set=root 1
	echo	'Loading Linux 6.1.0-42-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-42-amd64 root=UUID=1 ro  quiet "two words" $vt_handoff
	initrd	/boot/ucode.img /boot/initrd.img-6.1.0-42-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Debian, with Linux 6.1.0-42' --class debian $menuentry_id_option 'gnulinux-6.1.0-42-advanced-1' {
		linux	/boot/vmlinuz-6.1.0-42-amd64 root=UUID=1 ro
		initrd	/boot/initrd.img-6.1.0-42-amd64
	}
	menuentry 'Debian, with Linux 6.1.0-42 (recovery)' $menuentry_id_option 'recovery-1' {
		linux	/boot/vmlinuz-6.1.0-42-amd64 root=UUID=1 ro single
	}
}
menuentry 'UEFI Firmware Settings' { fwsetup }
"#;

    #[test]
    fn what_debian_writes_starts_its_first_entry() {
        let entry = chosen(DEBIAN, None).unwrap();
        assert_eq!(entry.kernel, "/boot/vmlinuz-6.1.0-42-amd64");
        assert_eq!(entry.initrds, ["/boot/ucode.img", "/boot/initrd.img-6.1.0-42-amd64"]);
        assert_eq!(entry.options, ["root=UUID=1", "ro", "quiet", "two words"]);
    }

    #[test]
    fn the_default_may_be_a_number_an_id_or_what_was_saved() {
        let with = |default: &str, saved| {
            let config = DEBIAN.replace("set default=\"0\"", &format!("set default=\"{default}\""));
            chosen(&config, saved).unwrap().options
        };
        assert!(with("1>1", None).contains(&"single".to_owned()));
        assert!(with("gnulinux-advanced-1>recovery-1", None).contains(&"single".to_owned()));
        assert!(with("${saved_entry}", Some("recovery-1")).contains(&"single".to_owned()));
        for first in ["${saved_entry}", "1>7", "no such", "", ">", "18446744073709551616"] {
            assert!(with(first, None).contains(&"quiet".to_owned()), "{first}");
        }
        let block = "# GRUB Environment Block\nsaved_entry=a=b\n####";
        assert_eq!(environment(block, "saved_entry").as_deref(), Some("a=b"));
        assert_eq!(environment(block, "saved"), None);
    }

    #[test]
    fn a_configuration_without_a_menu_starts_what_it_says() {
        let entry = chosen(
            "serial --unit=0\nlinux /vmlinuz root=LABEL=box ro # now\ninitrd /initrd.img\nboot\n",
            None,
        );
        let entry = entry.unwrap();
        assert_eq!((entry.kernel.as_str(), entry.initrds.len()), ("/vmlinuz", 1));
        assert_eq!(entry.options, ["root=LABEL=box", "ro"]);
    }

    #[test]
    fn garbage_starts_nothing() {
        for bad in [
            "",
            "}}}}}",
            "menuentry",
            "menuentry x {\nlinux\n}",
            "linux",
            "submenu {\n}",
            "linux $kernel\n",
            "\0\"'",
        ] {
            assert_eq!(chosen(bad, Some("x")), None, "{bad}");
        }
        assert_eq!(chosen(&"menuentry a {\n".repeat(100_000), None), None);
        assert_eq!(chosen(&"menuentry a {\nlinux /a\n}\n".repeat(10_000), None).unwrap().kernel, "/a");
        let long = format!("linux /a {}\n", "b ".repeat(100_000));
        assert!(chosen(&long, None).unwrap().options.len() < MAX_WORDS);
        assert!(chosen("linux /a 'b\x1b\x07\u{0}c'\n", None).unwrap().options[0] == "bc");
    }
}
