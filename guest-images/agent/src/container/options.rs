//! Options of mounts, as fstab(5) and the OCI runtime specification ("Mounts", "Linux mount options") have them.

use nix::mount::MsFlags;

/// What options say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Flags of the mount itself.
    pub flags: MsFlags,
    /// How what is mounted below passes on, one after another.
    pub propagation: Vec<MsFlags>,
    /// Whether a bind takes along what is mounted below its source.
    pub recursive: bool,
    /// What the file system is told, with commas between.
    pub data: String,
}

/// Flags by what they are called; false takes them away.
const FLAGS: [(&str, bool, MsFlags); 27] = [
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("rro", true, MsFlags::MS_RDONLY),
    ("rrw", false, MsFlags::MS_RDONLY),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("suid", false, MsFlags::MS_NOSUID),
    ("nodev", true, MsFlags::MS_NODEV),
    ("dev", false, MsFlags::MS_NODEV),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("atime", false, MsFlags::MS_NOATIME),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("lazytime", true, MsFlags::MS_LAZYTIME),
    ("nolazytime", false, MsFlags::MS_LAZYTIME),
    ("silent", true, MsFlags::MS_SILENT),
    ("loud", false, MsFlags::MS_SILENT),
];

/// Whether what is mounted below counts as well is the `r` before the name.
const PROPAGATION: [(&str, MsFlags); 4] = [
    ("private", MsFlags::MS_PRIVATE),
    ("shared", MsFlags::MS_SHARED),
    ("slave", MsFlags::MS_SLAVE),
    ("unbindable", MsFlags::MS_UNBINDABLE),
];

/// What is the runtime's to know, or says nothing.
const IGNORED: [&str; 8] = ["bind", "defaults", "remount", "nocopy", "tmpcopyup", "z", "Z", "iversion"];

/// Reads options.
pub fn parse(options: &[String]) -> Options {
    let mut read =
        Options { flags: MsFlags::empty(), propagation: Vec::new(), recursive: false, data: String::new() };
    for option in options.iter().map(String::as_str).filter(|option| !option.is_empty()) {
        let of_all = option.strip_prefix('r').filter(|rest| PROPAGATION.iter().any(|(name, _)| name == rest));
        if let Some((_, set, flag)) = FLAGS.iter().find(|(name, ..)| *name == option) {
            read.flags.set(*flag, *set);
        } else if let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| *name == of_all.unwrap_or(option))
        {
            let recursive = if of_all.is_some() { MsFlags::MS_REC } else { MsFlags::empty() };
            read.propagation.push(*flag | recursive);
        } else if option == "rbind" {
            read.recursive = true;
        } else if !IGNORED.contains(&option) {
            if !read.data.is_empty() {
                read.data.push(',');
            }
            read.data.push_str(option);
        }
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(options: &[&str]) -> Options {
        parse(&options.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_flags_and_the_rest_is_the_file_systems() {
        let read = of(&["nosuid", "strictatime", "mode=755", "size=65536k", "ro", "rw", "ro"]);
        assert_eq!(read.flags, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME | MsFlags::MS_RDONLY);
        assert_eq!(read.data, "mode=755,size=65536k");
        assert!(!read.recursive && read.propagation.is_empty());
    }

    #[test]
    fn binds_have_no_data_and_say_how_they_propagate() {
        let read = of(&["rbind", "rprivate", "slave", "rw", "", "z"]);
        assert_eq!((read.recursive, read.data.as_str()), (true, ""));
        assert_eq!(read.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC, MsFlags::MS_SLAVE]);
        assert_eq!(read.flags, MsFlags::empty());
    }
}
