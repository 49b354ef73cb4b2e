package main

import (
	"encoding/json"
	"fmt"
)

const (
	// The agent writes ~/.ssh/authorized_keys anew at each start. authorized_keys2, which sshd reads as well
	// (sshd_config(5), AuthorizedKeysFile), is the user's own.
	addKey = "umask 077 && mkdir -p ~/.ssh && cd ~/.ssh && cat >>authorized_keys2 && sync authorized_keys2"

	dockerSettings = "/etc/docker/daemon.json"
)

// What libmachine's provisioner says on dockerd's command line. dockerd does not start where its file says
// it too.
var provisioned = []string{
	"hosts", "labels", "storage-driver", "tls", "tlscacert", "tlscert", "tlskey", "tlsverify",
}

// admit lets a key's owner log in as user.
func (c client) admit(id, user, key string) error {
	if err := c.run(id, command{Argv: []string{"sh", "-c", addKey}, User: user, Stdin: key}); err != nil {
		return fmt.Errorf("the machine's SSH key cannot be put into the guest: %w", err)
	}
	return nil
}

// leaveDockerToProvisioner takes what libmachine's provisioner will say out of the guest's Docker settings.
func (c client) leaveDockerToProvisioner(id string) error {
	before, err := c.readFile(id, dockerSettings)
	if isRefusal(err, "path_not_found") {
		return nil
	}
	if err == nil {
		after, changed := withoutProvisioned(before)
		if !changed {
			return nil
		}
		err = c.writeFile(id, dockerSettings, after)
	}
	if err != nil {
		return fmt.Errorf("%s in the guest cannot be adapted: %w", dockerSettings, err)
	}
	return nil
}

// withoutProvisioned gives the settings without those, and whether any was there. What is no JSON object is
// left as it is.
func withoutProvisioned(settings []byte) ([]byte, bool) {
	var all map[string]json.RawMessage
	if json.Unmarshal(settings, &all) != nil {
		return settings, false
	}
	before := len(all)
	for _, name := range provisioned {
		delete(all, name)
	}
	if len(all) == before {
		return settings, false
	}
	after, err := json.MarshalIndent(all, "", "  ")
	return append(after, '\n'), err == nil
}
