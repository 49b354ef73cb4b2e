//! What it does to a process is shown where it is used: `devices::fs::confined_tests`.

use super::*;

#[test]
fn a_shortcoming_is_told_in_one_line() {
    let with = |landlock| Confinement { bounding_set: false, landlock };
    assert_eq!(with(Landlock::Full).shortcoming(), None);
    for landlock in [Landlock::Partial, Landlock::None] {
        let line = with(landlock).shortcoming().unwrap();
        assert!(line.contains("Landlock") && !line.contains('\n'));
    }
}
