//! catalyst-daemon: VM store, engines, network, REST.
