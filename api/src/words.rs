//! What texts may be, as the description of the API says it. The daemon's own checks are what counts.

use utoipa::ToSchema;

/// A VM's id: letters, digits, `-`, `_` and `.`, a letter or digit at both ends; not `power`.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$", max_length = 63)]
pub struct VmId(pub String);

/// A display name: no control characters, and no `.` at its beginning.
#[derive(Debug, ToSchema)]
#[schema(
    pattern = "^(?:[^.\\u0000-\\u001f\\u007f-\\u009f][^\\u0000-\\u001f\\u007f-\\u009f]*)?$",
    max_length = 64
)]
pub struct DisplayName(pub String);

/// A tag: no comma and no control characters, and no `.` at its beginning.
#[derive(Debug, ToSchema)]
#[schema(
    pattern = "^(?:[^.,\\u0000-\\u001f\\u007f-\\u009f][^,\\u0000-\\u001f\\u007f-\\u009f]*)?$",
    max_length = 64
)]
pub struct Tag(pub String);

/// An image's name: letters in lower case, digits, `-` and `.`, beginning with a letter or digit.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[a-z0-9][a-z0-9.-]{0,63}$", max_length = 64)]
pub struct ImageName(pub String);

/// A name of a snapshot or a folder: no control character and no `/`.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[^/\\u0000-\\u001f\\u007f-\\u009f]+$", min_length = 1, max_length = 80)]
pub struct PathPart(pub String);

/// An absolute path.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^/[^\\u0000]*$", min_length = 1, max_length = 4096)]
pub struct AbsolutePath(pub String);

/// A state of a VM's power that a client of AppCatalyst asks for, bare.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^(on|off|shutdown|suspend|pause|unpause)$")]
pub struct PowerWord(pub String);

/// Whether folders are shared, as a client of AppCatalyst says it, bare.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^(true|false)$")]
pub struct Switch(pub String);

/// An argument of a command, or what is like one: no NUL.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[^\\u0000]*$")]
pub struct Word(pub String);

/// `NAME=value`.
#[derive(Debug, ToSchema)]
#[schema(pattern = "^[^=\\u0000]+=[^\\u0000]*$")]
pub struct Variable(pub String);
