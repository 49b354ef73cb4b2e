package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rancher/machine/libmachine/drivers"
	"github.com/rancher/machine/libmachine/log"
	"github.com/rancher/machine/libmachine/mcnflag"
	"github.com/rancher/machine/libmachine/ssh"
	"github.com/rancher/machine/libmachine/state"
)

const (
	defaultURL = "http://localhost:8080"
	// The size that templates are made warm for without being asked.
	defaultCPUs   = 1
	defaultMemory = 1024
	defaultDisk   = 64
	defaultUser   = "catalyst"
	dockerPort    = "2376"

	// Every VM that this driver makes has it.
	tag = "docker-machine"

	// Limits against hanging, not promises: two machines may boot at once on a software CPU.
	sshLimit    = 5 * time.Minute
	dockerLimit = 2 * time.Minute
)

// Driver is one machine. Its exported fields are saved in the machine's config.json.
type Driver struct {
	*drivers.BaseDriver
	// Where the daemon is.
	URL string
	// Virtual CPUs.
	CPUs int
	// Memory in MiB.
	Memory int
	// Virtual size of the disk in GiB.
	Disk int
	// Template that the VM is made from; the daemon's own choice if empty.
	Template string
	// Tags of the VM besides the driver's own.
	Tags []string
	// MAC address of the VM, which it has for life: another VM of the same name is not this machine's.
	MAC string
}

func newDriver() *Driver {
	return &Driver{
		BaseDriver: &drivers.BaseDriver{SSHUser: defaultUser, SSHPort: drivers.DefaultSSHPort},
		URL:        defaultURL,
		CPUs:       defaultCPUs,
		Memory:     defaultMemory,
		Disk:       defaultDisk,
	}
}

// DriverName is what `create --driver` takes.
func (d *Driver) DriverName() string {
	return "catalyst"
}

// GetCreateFlags are the flags of `create`.
func (d *Driver) GetCreateFlags() []mcnflag.Flag {
	return []mcnflag.Flag{
		mcnflag.StringFlag{
			Name: "catalyst-url", EnvVar: "CATALYST_URL", Value: defaultURL,
			Usage: "Address of the Catalyst daemon",
		},
		mcnflag.IntFlag{
			Name: "catalyst-cpu-count", EnvVar: "CATALYST_CPU_COUNT", Value: defaultCPUs,
			Usage: "Number of virtual CPUs",
		},
		mcnflag.IntFlag{
			Name: "catalyst-memory-size", EnvVar: "CATALYST_MEMORY_SIZE", Value: defaultMemory,
			Usage: "Memory in MiB",
		},
		mcnflag.IntFlag{
			Name: "catalyst-disk-size", EnvVar: "CATALYST_DISK_SIZE", Value: defaultDisk,
			Usage: "Size of the disk in GiB, which takes only what is written",
		},
		mcnflag.StringFlag{
			Name: "catalyst-template", EnvVar: "CATALYST_TEMPLATE",
			Usage: "Template to make the VM from (the daemon's default if empty)",
		},
		mcnflag.StringFlag{
			Name: "catalyst-ssh-user", EnvVar: "CATALYST_SSH_USER", Value: defaultUser,
			Usage: "User of the template to log in as, who needs sudo without password",
		},
		mcnflag.StringSliceFlag{
			Name: "catalyst-tag", EnvVar: "CATALYST_TAG",
			Usage: "Tag of the VM, besides docker-machine; may be given again",
		},
	}
}

// SetConfigFromFlags takes the flags of `create`. What sizes are possible the daemon knows.
func (d *Driver) SetConfigFromFlags(flags drivers.DriverOptions) error {
	d.URL = strings.TrimRight(flags.String("catalyst-url"), "/")
	d.CPUs = flags.Int("catalyst-cpu-count")
	d.Memory = flags.Int("catalyst-memory-size")
	d.Disk = flags.Int("catalyst-disk-size")
	d.Template = flags.String("catalyst-template")
	d.SSHUser = flags.String("catalyst-ssh-user")
	d.Tags = flags.StringSlice("catalyst-tag")
	d.SetSwarmConfigFromFlags(flags)
	at, err := url.Parse(d.URL)
	if err != nil || at.Scheme != "http" && at.Scheme != "https" || at.Host == "" {
		return fmt.Errorf("--catalyst-url is %q, which is not an address such as %s", d.URL, defaultURL)
	}
	if d.SSHUser == "" {
		return errors.New("--catalyst-ssh-user is empty, where it names a user such as " + defaultUser)
	}
	for _, name := range []string{"catalyst-cpu-count", "catalyst-memory-size", "catalyst-disk-size"} {
		if flags.Int(name) < 1 {
			return fmt.Errorf("--%s is %d, where 1 is the least that makes sense", name, flags.Int(name))
		}
	}
	return nil
}

// PreCreateCheck fails where nothing can come of `create`, before anything is made.
func (d *Driver) PreCreateCheck() error {
	if err := d.client().check(); err != nil {
		return err
	}
	switch _, err := d.client().vm(d.MachineName); {
	case err == nil:
		const message = "there is a VM '%s' already; choose another name, or delete it: catalyst vm delete %s"
		return fmt.Errorf(message, d.MachineName, d.MachineName)
	case isRefusal(err, "vm_not_found"):
		return nil
	default:
		return err
	}
}

// Create makes the VM and lets the machine's key in, or leaves nothing of it.
func (d *Driver) Create() error {
	say("Making an SSH key...")
	if err := ssh.GenerateSSHKey(d.GetSSHKeyPath()); err != nil {
		return err
	}
	key, err := os.ReadFile(d.GetSSHKeyPath() + ".pub")
	if err != nil {
		return err
	}
	say("Making the VM '%s'...", d.MachineName)
	made, err := d.client().create(createVM{
		ID: d.MachineName, Template: d.Template, CPUs: d.CPUs, Memory: d.Memory, Disk: d.Disk,
		Tags: append([]string{tag}, d.Tags...),
	})
	if err != nil {
		return err
	}
	d.MAC, d.IPAddress = made.MAC, made.Address
	if err := d.begin(string(key)); err != nil {
		if left := d.client().remove(d.MachineName); left != nil {
			return fmt.Errorf("%w; the VM is left behind: %w", err, left)
		}
		return err
	}
	return nil
}

// begin starts the VM for the first time and prepares its guest.
func (d *Driver) begin(key string) error {
	say("Starting the VM '%s'...", d.MachineName)
	if err := d.client().power(d.MachineName, "on"); err != nil {
		return err
	}
	if err := d.waitForSSH(); err != nil {
		return err
	}
	if err := d.client().admit(d.MachineName, d.SSHUser, key); err != nil {
		return err
	}
	return d.client().leaveDockerToProvisioner(d.MachineName)
}

// Start starts the VM, or lets one that is suspended or paused go on.
func (d *Driver) Start() error {
	if err := d.power("on"); err != nil {
		return err
	}
	if err := d.waitForSSH(); err != nil {
		return err
	}
	// libmachine gives Docker half a minute; a boot on a software CPU may take longer. A template may have
	// no Docker.
	docker := func(now guest) bool { return now.Docker }
	if err := d.client().wait(d.MachineName, dockerLimit, "Docker", docker); err != nil {
		log.Debug(err)
	}
	return nil
}

// Stop shuts the guest down.
func (d *Driver) Stop() error {
	return d.power("shutdown")
}

// Restart shuts the guest down and starts the VM again.
func (d *Driver) Restart() error {
	if err := d.Stop(); err != nil {
		return err
	}
	return d.Start()
}

// Kill pulls the plug.
func (d *Driver) Kill() error {
	return d.power("off")
}

// Remove deletes the VM. One that is gone, or another of the same name, is no error.
func (d *Driver) Remove() error {
	_, err := d.vm()
	if err == nil {
		err = d.client().remove(d.MachineName)
	}
	if gone := new(goneError); errors.As(err, &gone) || isRefusal(err, "vm_not_found") {
		say("Nothing to delete: %s", err)
		return nil
	}
	return err
}

// GetState is the VM's power state in libmachine's terms.
func (d *Driver) GetState() (state.State, error) {
	found, err := d.vm()
	if err != nil {
		return state.Error, err
	}
	return stateOf(found.State)
}

// GetIP is the address of a VM that runs. It has it for life.
func (d *Driver) GetIP() (string, error) {
	found, err := d.vm()
	if err != nil {
		return "", err
	}
	if found.State != "powered on" {
		return "", drivers.ErrHostIsNotRunning
	}
	return found.Address, nil
}

// GetSSHHostname is the same address.
func (d *Driver) GetSSHHostname() (string, error) {
	return d.GetIP()
}

// GetURL is where Docker listens once the machine is provisioned.
func (d *Driver) GetURL() (string, error) {
	address, err := d.GetIP()
	if err != nil {
		return "", err
	}
	return "tcp://" + net.JoinHostPort(address, dockerPort), nil
}

func (d *Driver) client() client {
	return client{base: d.URL}
}

// goneError says that the machine's VM is no more.
type goneError struct {
	name string
	why  string
}

func (e *goneError) Error() string {
	// libmachine looks for the words "not found".
	return fmt.Sprintf("the VM of the machine '%s' is not found: %s", e.name, e.why)
}

// vm is the machine's VM; another of the same name is not.
func (d *Driver) vm() (*vm, error) {
	found, err := d.client().vm(d.MachineName)
	if isRefusal(err, "vm_not_found") {
		return nil, &goneError{d.MachineName, err.Error()}
	}
	if err != nil {
		return nil, err
	}
	// Where `create` was interrupted no address is known; before it there was no VM of this name.
	if found.MAC != d.MAC && (d.MAC != "" || !slices.Contains(found.Tags, tag)) {
		return nil, &goneError{d.MachineName, "there is another one of this name, with another MAC address"}
	}
	return found, nil
}

// power does a power operation with the machine's own VM.
func (d *Driver) power(op string) error {
	if _, err := d.vm(); err != nil {
		return err
	}
	return d.client().power(d.MachineName, op)
}

func (d *Driver) waitForSSH() error {
	answers := func(now guest) bool { return now.SSH }
	return d.client().wait(d.MachineName, sshLimit, "SSH", answers)
}

// stateOf translates the daemon's word.
func stateOf(word string) (state.State, error) {
	switch word {
	case "powered off":
		return state.Stopped, nil
	case "powering on":
		return state.Starting, nil
	case "powered on":
		return state.Running, nil
	case "powering off", "suspending":
		return state.Stopping, nil
	case "suspended":
		return state.Saved, nil
	case "paused":
		return state.Paused, nil
	case "blocked":
		return state.Error, nil
	default:
		return state.Error, fmt.Errorf("the daemon says %q of its VM, which this driver does not know", word)
	}
}
