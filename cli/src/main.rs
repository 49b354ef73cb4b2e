//! catalyst: the command line, a client of the daemon's REST API.

fn main() {}
