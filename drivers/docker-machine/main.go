// The docker-machine driver of Catalyst: the plugin that rancher-machine and docker-machine start for
// `create --driver catalyst`. It is a client of the daemon's REST API, as any other.
package main

import (
	"fmt"
	"os"

	"github.com/rancher/machine/libmachine/drivers/plugin"
	"github.com/rancher/machine/libmachine/log"
)

func main() {
	// rancher-machine shows a plugin's stdout to the user, among what `ip` or `ssh` print, and takes stderr for
	// debugging. libmachine's log debugs to stdout.
	log.SetOutWriter(os.Stderr)
	plugin.RegisterDriver(newDriver())
}

// say tells the user a line.
func say(format string, args ...any) {
	fmt.Printf(format+"\n", args...)
}
