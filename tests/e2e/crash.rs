//! x
use catalyst_tests::Checks;
pub fn crash(_: &mut Checks) {}
pub fn disk_full(_: &mut Checks) {}
