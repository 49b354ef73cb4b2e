//! The Debian mirror, release and keyring that the host itself uses: the image is built from the same.
//!
//! Reads sources.list(5) in both of its forms, `deb …` lines and deb822 stanzas. Sources of other vendors are
//! left out: an entry counts as Debian's if its keys are Debian's, or, where it names no keys, if its address
//! ends in `debian` or `debian-security`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Largest file of sources that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// One archive: an address with a suite and its components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Address of the archive.
    pub uri: String,
    /// Release or pocket (`bookworm`, `bookworm-security`).
    pub suite: String,
    /// Components (`main`).
    pub components: Vec<String>,
    /// Keyring file on the host, if the entry names one.
    pub signed_by: Option<PathBuf>,
}

/// The host's Debian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// The release (`bookworm`): the suite that is no pocket of another one.
    pub suite: String,
    /// All archives of that release.
    pub entries: Vec<Source>,
}

/// Why the host's sources give no image.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    /// A file cannot be read.
    #[error("cannot read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No Debian archive among the sources.
    #[error(
        "no Debian archive is among the apt sources in {apt}: add one, for instance a line \
         'deb <mirror>/debian <release> main' in {apt}/sources.list.d/debian.list", apt = .apt.display()
    )]
    NoDebian {
        /// apt's folder of settings.
        apt: PathBuf,
    },
    /// More than one release.
    #[error("the apt sources in {apt} name several Debian releases ({releases}): the image needs one; comment the others out", apt = .apt.display())]
    SeveralReleases {
        /// apt's folder of settings.
        apt: PathBuf,
        /// The releases found.
        releases: String,
    },
}

impl Source {
    /// The entry as a line of sources.list, with its keyring if `keys`.
    pub fn line(&self, keys: bool) -> String {
        let options = match &self.signed_by {
            Some(path) if keys => format!("[signed-by={}] ", path.display()),
            _ => String::new(),
        };
        format!("deb {options}{} {} {}", self.uri, self.suite, self.components.join(" "))
    }

    /// The release that the suite belongs to: `bookworm` of `bookworm-updates` and `bookworm/updates`.
    fn release(&self) -> &str {
        self.suite.split(['-', '/']).next().unwrap_or(&self.suite)
    }

    fn is_debian(&self) -> bool {
        let web = ["http://", "https://"].iter().any(|scheme| self.uri.starts_with(scheme));
        let last = self.uri.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let keys_are_debians = match &self.signed_by {
            Some(path) => path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with("debian-archive")),
            None => last == "debian" || last == "debian-security",
        };
        web && keys_are_debians && self.components.iter().any(|component| component == "main")
    }
}

/// Reads the sources below apt's folder of settings `apt` (`/etc/apt`).
pub fn read(apt: &Path) -> Result<Sources, SourcesError> {
    let mut entries = Vec::new();
    for path in source_files(apt)? {
        let text = read_text(&path)?;
        let found = if path.extension().is_some_and(|kind| kind == "sources") {
            stanzas(&text)
        } else {
            lines(&text)
        };
        for source in found {
            for uri in addresses(&source.uri)? {
                let source = Source { uri, ..source.clone() };
                if source.is_debian() && !entries.contains(&source) {
                    entries.push(source);
                }
            }
        }
    }
    // Backports and the like are pockets as well, but never what a package comes from by default.
    entries.retain(|source: &Source| {
        ["", "-updates", "-security", "/updates"].contains(&&source.suite[source.release().len()..])
    });
    let mut releases: Vec<_> = entries
        .iter()
        .filter(|entry| entry.suite == entry.release())
        .map(|entry| entry.suite.clone())
        .collect();
    releases.sort();
    releases.dedup();
    match releases.as_slice() {
        [] => Err(SourcesError::NoDebian { apt: apt.to_owned() }),
        [suite] => {
            let suite = suite.clone();
            entries.retain(|source| source.release() == suite);
            Ok(Sources { suite, entries })
        }
        _ => Err(SourcesError::SeveralReleases { apt: apt.to_owned(), releases: releases.join(", ") }),
    }
}

/// The files that apt reads, in its order.
fn source_files(apt: &Path) -> Result<Vec<PathBuf>, SourcesError> {
    let folder = apt.join("sources.list.d");
    let mut files = Vec::new();
    match fs::read_dir(&folder) {
        Ok(entries) => files.extend(entries.flatten().map(|entry| entry.path())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(SourcesError::Read { path: folder, source }),
    }
    files.retain(|path| path.extension().is_some_and(|kind| kind == "list" || kind == "sources"));
    files.sort();
    let main = apt.join("sources.list");
    if main.exists() {
        files.insert(0, main);
    }
    Ok(files)
}

fn read_text(path: &Path) -> Result<String, SourcesError> {
    let error = |source| SourcesError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(error)?.len() > MAX_FILE {
        return Err(error(io::Error::from(io::ErrorKind::FileTooLarge)));
    }
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).map_err(error)
}

/// The addresses that `uri` stands for: `mirror+file:` names a list of them (apt-transport-mirror(1)), as the
/// cloud images of Debian have it; of that list the first is taken.
fn addresses(uri: &str) -> Result<Vec<String>, SourcesError> {
    let Some(list) = uri.strip_prefix("mirror+file:") else { return Ok(vec![uri.to_owned()]) };
    let path = Path::new(list);
    if !path.is_absolute() {
        return Ok(Vec::new());
    }
    let text = read_text(path)?;
    let first = text
        .lines()
        .map(|line| line.split_whitespace().next().unwrap_or_default())
        .find(|address| !address.is_empty() && !address.starts_with('#'));
    Ok(first.map(str::to_owned).into_iter().collect())
}

/// Entries of the one-line form.
fn lines(text: &str) -> Vec<Source> {
    text.lines().filter_map(line).collect()
}

fn line(text: &str) -> Option<Source> {
    let text = text.split('#').next()?.trim();
    let mut rest = text.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let mut signed_by = None;
    if let Some(after) = rest.strip_prefix('[') {
        let (options, entry) = after.split_once(']')?;
        signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        rest = entry;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uri: words.next()?,
        suite: words.next()?,
        components: words.collect(),
        signed_by: signed_by.map(PathBuf::from),
    })
}

/// Entries of the deb822 form: one for each address and suite of a stanza.
fn stanzas(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            found.extend(stanza(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    found
}

fn stanza(fields: &[(String, String)]) -> Vec<Source> {
    let words = |name: &str| -> Vec<String> {
        let value = fields.iter().find(|(field, _)| field == name).map_or("", |(_, value)| value);
        value.split_whitespace().map(str::to_owned).collect()
    };
    let enabled = !words("enabled").first().is_some_and(|word| word.eq_ignore_ascii_case("no"));
    if !enabled || !words("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    // A key may stand in the stanza itself; its first line is then no path.
    let signed_by = words("signed-by").into_iter().next().map(PathBuf::from);
    let components = words("components");
    let suites = words("suites");
    words("uris")
        .iter()
        .flat_map(|uri| suites.iter().map(move |suite| (uri.clone(), suite.clone())))
        .map(|(uri, suite)| Source {
            uri,
            suite,
            components: components.clone(),
            signed_by: signed_by.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_files(files: &[(&str, &str)]) -> Result<Sources, SourcesError> {
        let apt = tempfile::tempdir().unwrap();
        fs::create_dir(apt.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            fs::write(apt.path().join(name), text).unwrap();
        }
        read(apt.path())
    }

    fn found(sources: &Sources) -> Vec<String> {
        sources.entries.iter().map(|source| source.line(false)).collect()
    }

    #[test]
    fn stanzas_of_debian_are_taken_and_those_of_others_left() {
        let sources = read_files(&[
            (
                "sources.list.d/debian.sources",
                "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian/\nSuites: bookworm\n bookworm-updates\n\
                 Components: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
                 Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                 Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n\n\
                 Types: deb\nEnabled: no\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\n",
            ),
            (
                "sources.list.d/other.sources",
                "Types: deb\nURIs: https://vendor.example/debian\nSuites: bookworm\nComponents: main\n\
                 Signed-By: /usr/share/keyrings/vendor.gpg\n",
            ),
        ])
        .unwrap();
        assert_eq!(sources.suite, "bookworm");
        assert_eq!(
            found(&sources),
            [
                "deb http://mirror.example/debian/ bookworm main contrib",
                "deb http://mirror.example/debian/ bookworm-updates main contrib",
                "deb http://mirror.example/debian-security bookworm-security main",
            ]
        );
        assert!(
            sources.entries[0]
                .line(true)
                .contains("[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ")
        );
    }

    #[test]
    fn lines_of_debian_are_taken_and_those_of_others_left() {
        let sources = read_files(&[
            (
                "sources.list",
                "deb http://m.example/debian bookworm main # mirror\n\
                 deb-src http://m.example/debian bookworm main\n\
                 #deb http://m.example/debian sid main\ndebug\ndeb\ndeb [\n\
                 deb [arch=amd64 signed-by=/k/debian-archive-keyring.gpg] https://m.example/security bookworm-security main\n",
            ),
            ("sources.list.d/a.list", "deb https://packages.example/apt cloud main\ndeb cdrom:[x]/ bookworm main\n"),
            ("sources.list.d/a.list.save", "deb http://m.example/debian sid main\n"),
        ])
        .unwrap();
        assert_eq!(
            found(&sources),
            [
                "deb http://m.example/debian bookworm main",
                "deb https://m.example/security bookworm-security main"
            ]
        );
    }

    #[test]
    fn a_list_of_mirrors_stands_for_its_first_address() {
        let list = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            list.path(),
            "# mirrors\nhttps://one.example/debian\tpriority:1\nhttps://two.example/debian\n",
        )
        .unwrap();
        let line = format!("deb mirror+file:{} bookworm main\n", list.path().display());
        let sources = read_files(&[("sources.list", &line)]).unwrap();
        assert_eq!(found(&sources), ["deb https://one.example/debian bookworm main"]);
    }

    #[test]
    fn no_release_or_several_are_refused_by_name() {
        let error =
            read_files(&[("sources.list", "deb http://archive.example/ubuntu jammy main\n")]).unwrap_err();
        assert!(error.to_string().contains("no Debian archive"), "{error}");
        let two = "deb http://m.example/debian bookworm main\ndeb http://m.example/debian trixie main\n";
        let error = read_files(&[("sources.list", two)]).unwrap_err();
        assert!(error.to_string().contains("bookworm, trixie"), "{error}");
    }
}
