//! Landlock (the kernel's documentation, userspace-api/landlock).
//!
//! A rule stands on the inode of the root folder. The kernel looks for rules from a file upwards, through mount
//! points, so what is mounted below that folder later is allowed as well. Once a share is unmounted its files find
//! no rule above them, and cannot be opened even by descriptors (`O_PATH`) that are left.

use std::fs::File;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::ConfineError;

/// How far Landlock reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlock {
    /// All that this monitor asks for, which is version 6 or later.
    Full,
    /// The kernel has an older version.
    Partial,
    /// The kernel has none, or it is switched off.
    None,
}

/// The version that is asked for; what the kernel does not know of it is left out.
const ABI: ABI = ABI::V7;

/// What virtio-fs does below the root. Nothing is executed there, no device node is made, and devices' own ioctls
/// are for nobody.
fn share_rights() -> BitFlags<AccessFs> {
    AccessFs::from_all(ABI)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev)
}

/// Restricts the calling thread and those that it makes later.
pub(super) fn restrict(roots: &[&File]) -> Result<Landlock, ConfineError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI))?
        .handle_access(AccessNet::from_all(ABI))?
        .scope(Scope::from_all(ABI))?
        .create()?;
    for root in roots {
        ruleset = ruleset.add_rule(PathBeneath::new(root, share_rights()))?;
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::None,
    })
}
