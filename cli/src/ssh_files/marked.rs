//! What is ours in a file of the user's: blocks between two marks, and every other byte as it was.

/// How the line before our blocks begins; the rest of it is for people.
const BEGIN: &str = "# >>> catalyst";
const BEGIN_LINE: &str = "# >>> catalyst: made by `catalyst ssh-config`, which also rewrites it >>>";
const END_LINE: &str = "# <<< catalyst <<<";
/// How a block's first line begins.
const HEAD: &str = "# VM ";

/// A file in its parts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Marked<'a> {
    before: &'a [u8],
    /// Ours.
    pub blocks: Vec<Block>,
    after: &'a [u8],
}

/// What a file says of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its id.
    pub vm: String,
    /// The folder of its daemon's VMs, which tells VMs of one name apart.
    pub of: String,
    /// The lines, each with its end.
    pub lines: String,
}

/// The line at which the marks are not as they were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged(pub usize);

impl<'a> Marked<'a> {
    /// Takes a file apart.
    pub fn parse(file: &'a [u8]) -> Result<Self, Damaged> {
        let (mut begin, mut end, mut at) = (None, None, 0);
        let mut blocks = Vec::new();
        for (number, raw) in file.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let damaged = Damaged(number + 1);
            // An editor may have given our lines another end too.
            let line = raw.strip_suffix(b"\n").unwrap_or(raw);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let inside = begin.is_some() && end.is_none();
            if line.starts_with(BEGIN.as_bytes()) {
                if begin.replace(at).is_some() {
                    return Err(damaged);
                }
            } else if line == END_LINE.as_bytes() {
                if !inside {
                    return Err(damaged);
                }
                end = Some(at + raw.len());
            } else if inside {
                take(&mut blocks, std::str::from_utf8(line).map_err(|_| damaged)?);
            }
            at += raw.len();
        }
        match (begin, end) {
            (None, _) => Ok(Self { before: b"", blocks, after: file }),
            (Some(begin), Some(end)) => Ok(Self { before: &file[..begin], blocks, after: &file[end..] }),
            (Some(begin), None) => Err(Damaged(file[..begin].split(|&byte| byte == b'\n').count())),
        }
    }

    /// The file again; `tail` is the last line of ours, for what is the user's behind it. Without blocks no mark is left.
    pub fn render(&self, tail: &str) -> Vec<u8> {
        let mut file = self.before.to_vec();
        if !self.blocks.is_empty() {
            file.extend(format!("{BEGIN_LINE}\n").bytes());
            for block in &self.blocks {
                file.extend(format!("{HEAD}{} of {}\n{}", block.vm, block.of, block.lines).bytes());
            }
            file.extend(format!("{tail}{END_LINE}\n").bytes());
        }
        file.extend(self.after);
        file
    }
}

/// A line between the marks.
fn take(blocks: &mut Vec<Block>, line: &str) {
    if let Some((vm, of)) = line.strip_prefix(HEAD).and_then(|rest| rest.split_once(" of ")) {
        blocks.push(Block { vm: vm.to_owned(), of: of.to_owned(), lines: String::new() });
    } else if line != super::TAIL.trim_end()
        && let Some(block) = blocks.last_mut()
    {
        block.lines.push_str(line);
        block.lines.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(vm: &str) -> Block {
        Block { vm: vm.to_owned(), of: "/v m/of".to_owned(), lines: format!("Host {vm}\n  Port 22\n") }
    }

    /// Files as users have them.
    const FILES: [&[u8]; 8] = [
        b"",
        b"\n",
        b"ServerAliveInterval 60\n\nHost *\n  User me\n",
        b"Host a\r\n  Port 1\r\n# b\r\n",
        b"Host a\n  # no end of line",
        b"\xef\xbb\xbf# \xff\xfe not text\n\tHost=x",
        b"# >> catalyst\n# <<< catalyst <<",
        b"\r\r\n\n\n",
    ];

    #[test]
    fn what_was_added_is_found_again_and_leaves_no_trace() {
        for file in FILES {
            let mut marked = Marked::parse(file).unwrap();
            assert!(marked.blocks.is_empty());
            marked.blocks = vec![block("web1"), block("web2")];
            let with = marked.render(super::super::TAIL);
            assert!(with.ends_with(file));
            let mut again = Marked::parse(&with).unwrap();
            assert_eq!(again.blocks, [block("web1"), block("web2")]);
            assert_eq!(again.render(super::super::TAIL), with);
            again.blocks.clear();
            assert_eq!(again.render(super::super::TAIL), file);
        }
    }

    #[test]
    fn blocks_stay_where_the_user_has_moved_them() {
        let mut ours = Marked::default();
        ours.blocks.push(block("web1"));
        let moved = [b"Host a\r\n".to_vec(), ours.render(""), b"Host b".to_vec()].concat();
        let mut marked = Marked::parse(&moved).unwrap();
        marked.blocks.push(block("web2"));
        let more = marked.render("");
        assert!(more.starts_with(b"Host a\r\n# >>> catalyst") && more.ends_with(b"<<<\nHost b"));
        let mut marked = Marked::parse(&more).unwrap();
        marked.blocks.clear();
        assert_eq!(marked.render(""), b"Host a\r\nHost b");
    }

    #[test]
    fn marks_with_other_ends_of_line_are_still_marks() {
        let mut marked = Marked::parse(b"Host a\r\n").unwrap();
        marked.blocks.push(block("web1"));
        let text = String::from_utf8(marked.render(super::super::TAIL)).unwrap();
        let text = text.replace("\r\n", "\n").replace('\n', "\r\n").into_bytes();
        let mut marked = Marked::parse(&text).unwrap();
        assert_eq!(marked.blocks, [block("web1")]);
        marked.blocks.clear();
        assert_eq!(marked.render(""), b"Host a\r\n");
    }

    #[test]
    fn damaged_marks_are_told_by_their_line() {
        for (file, line) in [
            ("Host a\n# >>> catalyst >>>\n# VM a of b\n", 2),
            ("# <<< catalyst <<<\n", 1),
            ("# >>> catalyst\n# <<< catalyst <<<\n# >>> catalyst\n", 3),
            ("# >>> catalyst\n# >>> catalyst\n# <<< catalyst <<<\n", 2),
        ] {
            assert_eq!(Marked::parse(file.as_bytes()), Err(Damaged(line)), "{file}");
        }
        assert_eq!(Marked::parse(b"# >>> catalyst\n\xff\n# <<< catalyst <<<"), Err(Damaged(2)));
    }
}
