package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/durable"
)

// placesEvery is how often the agent looks whether its data directory and its socket are still in their places.
const placesEvery = 2 * time.Second

// keepPlaces makes the data directory anew if somebody removed it, and returns an error if the agent must end for it, or because
// nobody can reach its socket any more: whoever started it starts it anew then, with a directory and a socket of its own. Under
// Landlock, and where the directory was a volume of a container, it cannot make them itself.
func (a *Agent) keepPlaces(ctx context.Context) error {
	tick := time.NewTicker(placesEvery)
	defer tick.Stop()
	var said [2]bool
	say := func(i int, is bool, what string, err error) {
		if is && !said[i] {
			a.log.Error(what, "err", err)
		}
		said[i] = is
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		err := a.node.keepDir()
		there, ours := a.endpoint.InPlace()
		if ctx.Err() != nil {
			return nil
		}
		say(0, err != nil, "the data directory was removed and cannot be made anew; the agent serves from memory, and cannot renew its own SVID", err)
		if contact := a.contact.Load(); err != nil && a.node.attestor != nil && contact != nil && contact.there {
			return fmt.Errorf("data_dir %q was removed; the agent ends, to be started anew: %w", a.config.DataDir, err)
		}
		lost := fmt.Errorf("socket_path: nothing, or something else, is at %q, where the agent's socket was", a.config.SocketPath)
		say(1, !there, "nobody can call the agent any more; systemctl restart signet-agent.socket makes a socket of systemd's anew", lost)
		if !there && ours && err == nil { // without the directory, an agent that is started anew would have nothing
			return fmt.Errorf("%w; the agent ends, to be started anew with one", lost)
		}
	}
}

// keepDir makes the data directory anew, with the agent's record, if it is not there any more.
func (n *node) keepDir() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dir.there() {
		return nil
	}
	if err := n.dir.remake(); err != nil {
		return err
	}
	n.log.Warn("the data directory was removed, and is made anew", "data_dir", n.dir.path)
	if r := n.record.Load(); r != nil {
		return n.dir.save(r)
	}
	return nil
}

// there says whether the directory is the one that was opened.
func (d *nodeDir) there() bool {
	held, err := d.lock.Stat()
	if err != nil {
		return true
	}
	now, err := os.Stat(d.lockPath())
	return err == nil && os.SameFile(held, now) || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// remake makes the directory anew, and keeps other agents out of it.
func (d *nodeDir) remake() error {
	if err := durable.MkdirPrivate(d.path); err != nil {
		return err
	}
	lock, err := d.takeLock()
	if err != nil {
		return err
	}
	d.lock.Close() // its file is gone
	d.lock = lock
	return nil
}

// takeLock locks the directory.
func (d *nodeDir) takeLock() (*os.File, error) {
	lock, err := os.OpenFile(d.lockPath(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%q is in use by another agent; give each its own", d.path), lock.Close())
	}
	return lock, nil
}
