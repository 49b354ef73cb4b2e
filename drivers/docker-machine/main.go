// The docker-machine driver of Catalyst: the plugin that rancher-machine and docker-machine start for
// `create --driver catalyst`. It is a client of the daemon's REST API, as any other.
package main

import "github.com/rancher/machine/libmachine/drivers/plugin"

func main() {
	plugin.RegisterDriver(newDriver())
}
