// Package svidfiles keeps the SVIDs of a workload in files, for programs that only read files: it writes them as sets of
// which a reader sees one or the other, and tells the program that there is a new one. Its caller is the command
// `signet svid fetch`; SVIDs come from the Workload API. It never prints a key or a token.
package svidfiles

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/internal/durable"
)

// A File is one file of a set.
type File struct {
	Name   string
	Data   []byte
	Secret bool // gets DirConfig.SecretMode
}

// DirConfig says where files are written and whose they are.
type DirConfig struct {
	// Path is the directory. One that is missing is made, for Owner and Group alone.
	Path string

	// Owner and Group are numbers of a user and a group; -1 is who writes.
	Owner, Group int

	// SecretMode is the mode of files with keys and tokens, and PublicMode that of the others. Zero means 0600 and 0644.
	SecretMode, PublicMode fs.FileMode
}

// A Dir is a directory that shows one set of files at a time. Its files are links into a directory of the set, through one
// link that is replaced when there is a new set, as Kubernetes does it for its volumes:
//
//	svid.pem → ..data/svid.pem    key.pem → ..data/key.pem    ..data → ..set-ABC/    ..set-ABC/svid.pem
//
// So who opens files through ..data, opened once, always has files of one set, and who opens single files has whole ones.
// The set before stays for a reader that is in the midst of it. A Dir is used by one goroutine.
type Dir struct {
	cfg  DirConfig
	root *os.Root
	lock *os.File
	step func(string) error // tests break off here; nil otherwise
}

const (
	dataLink  = "..data"
	newLink   = "..new"
	lockFile  = "..lock"
	setPrefix = "..set-"
)

var setName = regexp.MustCompile(`^\.\.set-[A-Z2-7]{26}$`)

// OpenDir takes a directory, for this process alone.
func OpenDir(cfg DirConfig) (*Dir, error) {
	if cfg.SecretMode == 0 {
		cfg.SecretMode = 0o600
	}
	if cfg.PublicMode == 0 {
		cfg.PublicMode = 0o644
	}
	if err := makeDir(cfg); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(cfg.Path)
	if err != nil {
		return nil, err
	}
	d := &Dir{cfg: cfg, root: root}
	if err := d.take(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	return d, nil
}

func makeDir(cfg DirConfig) error {
	_, err := os.Lstat(cfg.Path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := durable.MkdirAll(filepath.Dir(cfg.Path), 0o755); err != nil {
		return err
	}
	mode := fs.FileMode(0o700)
	if cfg.Group >= 0 {
		mode = 0o750
	}
	if err := durable.MkdirAll(cfg.Path, mode); err != nil {
		return err
	}
	if cfg.Owner < 0 && cfg.Group < 0 {
		return nil
	}
	if err := os.Lchown(cfg.Path, cfg.Owner, cfg.Group); err != nil {
		return fmt.Errorf("giving directory %s to its owner: %w (only root may give files away)", cfg.Path, err)
	}
	return nil
}

// take refuses a directory in which everybody may put files, and one that another process keeps.
func (d *Dir) take() error {
	info, err := d.root.Stat(".")
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Errorf("directory %s is writable by everybody (mode %04o), who could put other files there: chmod o-w %s", d.cfg.Path, info.Mode().Perm(), d.cfg.Path)
	}
	if d.lock, err = d.root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600); err != nil {
		return fmt.Errorf("directory %s: %w", d.cfg.Path, err)
	}
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("another process keeps the files in %s: stop it, or choose another directory", d.cfg.Path)
		}
		return fmt.Errorf("locking %s: %w", d.cfg.Path, err)
	}
	return nil
}

// Close gives the directory back. The files stay.
func (d *Dir) Close() error { return errors.Join(d.lock.Close(), d.root.Close()) }

// Path is where the file of that name is.
func (d *Dir) Path(name string) string { return filepath.Join(d.cfg.Path, name) }

// CheckName refuses names that are none, or that the directory itself uses.
func CheckName(name string) error {
	if name == "" || strings.HasPrefix(name, ".") || strings.ContainsAny(name, "/\\") || len(name) > 200 || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("%q is no name for a file: give one without / that does not begin with a dot", name)
	}
	return nil
}

// Publish shows the files instead of those before. After an error, or a crash at any moment, the directory shows either the
// old set or the new one.
func (d *Dir) Publish(files []File) error {
	names := map[string]bool{}
	for _, f := range files {
		if err := CheckName(f.Name); err != nil {
			return err
		}
		if names[f.Name] {
			return fmt.Errorf("two files would have the name %q", f.Name)
		}
		names[f.Name] = true
	}
	before, _ := d.root.Readlink(dataLink) // none: the first set
	if err := d.clean(before); err != nil {
		return err
	}
	set := setPrefix + rand.Text()
	if err := d.write(set, files); err != nil {
		return fmt.Errorf("writing files in %s: %w", d.cfg.Path, err)
	}
	if err := d.link(set, dataLink); err != nil {
		return fmt.Errorf("showing new files in %s: %w", d.cfg.Path, err)
	}
	for _, f := range files {
		if err := d.link(dataLink+"/"+f.Name, f.Name); err != nil {
			return fmt.Errorf("showing %s: %w", d.Path(f.Name), err)
		}
	}
	return d.tidy(names)
}

// write makes the directory of a set. Nobody but us reads anything of it before it is complete.
func (d *Dir) write(set string, files []File) error {
	if err := d.at("mkdir"); err != nil {
		return err
	}
	if err := d.root.Mkdir(set, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		if err := d.at("file"); err != nil {
			return err
		}
		if err := d.writeFile(set+"/"+f.Name, f); err != nil {
			return err
		}
	}
	if err := d.root.Lchown(set, d.cfg.Owner, d.cfg.Group); err != nil {
		return err
	}
	if err := d.root.Chmod(set, 0o755); err != nil {
		return err
	}
	return d.sync(set)
}

func (d *Dir) writeFile(path string, f File) error {
	out, err := d.root.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	mode := d.cfg.PublicMode
	if f.Secret {
		mode = d.cfg.SecretMode
	}
	_, err = out.Write(f.Data)
	if err == nil && (d.cfg.Owner >= 0 || d.cfg.Group >= 0) {
		err = out.Chown(d.cfg.Owner, d.cfg.Group)
	}
	if err == nil {
		err = out.Chmod(mode)
	}
	if err == nil {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}

// link makes name a link to target, whatever was there, in one step.
func (d *Dir) link(target, name string) error {
	if have, err := d.root.Readlink(name); err == nil && have == target {
		return nil
	}
	if err := d.root.Remove(newLink); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := d.at("symlink"); err != nil {
		return err
	}
	if err := d.root.Symlink(target, newLink); err != nil {
		return err
	}
	if err := d.at("rename"); err != nil {
		return err
	}
	if err := d.root.Rename(newLink, name); err != nil {
		return err
	}
	return d.sync(".")
}

// tidy takes away links to files that are not in the set any more.
func (d *Dir) tidy(names map[string]bool) error {
	if err := d.at("tidy"); err != nil {
		return err
	}
	links, err := d.links()
	if err != nil {
		return err
	}
	for _, name := range links {
		if !names[name] {
			if err := d.root.Remove(name); err != nil {
				return err
			}
		}
	}
	return d.sync(".")
}

// links are the names that we have made.
func (d *Dir) links() ([]string, error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if target, err := d.root.Readlink(e.Name()); err == nil && target == dataLink+"/"+e.Name() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// clean takes away sets that nothing shows: those before the one that is shown now, and what a crash left.
func (d *Dir) clean(keep ...string) error {
	if err := d.at("clean"); err != nil {
		return err
	}
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() && setName.MatchString(e.Name()) && !slices.Contains(keep, e.Name()) {
			if err := d.root.RemoveAll(e.Name()); err != nil {
				return fmt.Errorf("removing old files in %s: %w", d.cfg.Path, err)
			}
		}
	}
	return nil
}

// Remove takes all files away.
func (d *Dir) Remove() error {
	links, err := d.links()
	if err != nil {
		return err
	}
	for _, name := range append(links, dataLink) {
		if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return errors.Join(d.clean(), d.sync("."))
}

func (d *Dir) sync(name string) error {
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *Dir) at(step string) error {
	if d.step == nil {
		return nil
	}
	return d.step(step)
}
