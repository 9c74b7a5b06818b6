package k8spsat

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"

	"go.yaml.in/yaml/v3"

	"github.com/signet-id/signet/internal/durable"
)

// A kubeconfig is the path of a file in kubectl's format. It is read strictly: server, certificate authority, client
// certificate, token and tokenFile. What would run a program, or would not verify the server, is refused.
type kubeconfig string

// kubeFile is the format. Fields that are known and refused are here so that the message can say why.
type kubeFile struct {
	APIVersion     string        `yaml:"apiVersion"`
	Kind           string        `yaml:"kind"`
	Preferences    any           `yaml:"preferences"`
	Extensions     any           `yaml:"extensions"`
	CurrentContext string        `yaml:"current-context"`
	Clusters       []kubeCluster `yaml:"clusters"`
	Contexts       []kubeContext `yaml:"contexts"`
	Users          []kubeUser    `yaml:"users"`
}

type kubeCluster struct {
	Name    string `yaml:"name"`
	Cluster struct {
		Server             string `yaml:"server"`
		CA                 string `yaml:"certificate-authority"`
		CAData             string `yaml:"certificate-authority-data"`
		ServerName         string `yaml:"tls-server-name"`
		Insecure           bool   `yaml:"insecure-skip-tls-verify"`
		ProxyURL           string `yaml:"proxy-url"`
		DisableCompression bool   `yaml:"disable-compression"` // answers are never compressed here
		Extensions         any    `yaml:"extensions"`
	} `yaml:"cluster"`
}

type kubeContext struct {
	Name    string `yaml:"name"`
	Context struct {
		Cluster    string `yaml:"cluster"`
		User       string `yaml:"user"`
		Namespace  string `yaml:"namespace"`
		Extensions any    `yaml:"extensions"`
	} `yaml:"context"`
}

type kubeUser struct {
	Name string `yaml:"name"`
	User struct {
		ClientCert     string `yaml:"client-certificate"`
		ClientCertData string `yaml:"client-certificate-data"`
		ClientKey      string `yaml:"client-key"`
		ClientKeyData  string `yaml:"client-key-data"`
		Token          string `yaml:"token"`
		TokenFile      string `yaml:"tokenFile"`
		Exec           any    `yaml:"exec"`
		AuthProvider   any    `yaml:"auth-provider"`
		Username       string `yaml:"username"`
		Password       string `yaml:"password"`
		As             string `yaml:"as"`
		AsUID          string `yaml:"as-uid"`
		AsGroups       any    `yaml:"as-groups"`
		AsUserExtra    any    `yaml:"as-user-extra"`
		Extensions     any    `yaml:"extensions"`
	} `yaml:"user"`
}

func (k kubeconfig) load() (*credentials, error) {
	data, err := durable.ReadFile(string(k), maxCredentialBytes)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	c, err := parseKubeconfig(data, filepath.Dir(string(k)))
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", string(k), err)
	}
	return c, nil
}

// parseKubeconfig reads a kubeconfig; dir is where relative paths in it begin. No error of it repeats a secret.
func parseKubeconfig(data []byte, dir string) (*credentials, error) {
	f, err := decodeKubeconfig(data)
	if err != nil {
		return nil, err
	}
	context, ok := find(f.Contexts, func(c kubeContext) bool { return c.Name == f.CurrentContext })
	if !ok || f.CurrentContext == "" {
		return nil, fmt.Errorf("current-context: %q names no context, or more than one; choose one with kubectl config use-context", clip(f.CurrentContext))
	}
	cluster, ok := find(f.Clusters, func(c kubeCluster) bool { return c.Name == context.Context.Cluster })
	if !ok {
		return nil, fmt.Errorf("cluster %q of the current context does not exist, or more than once", clip(context.Context.Cluster))
	}
	user, ok := find(f.Users, func(u kubeUser) bool { return u.Name == context.Context.User })
	if !ok {
		return nil, fmt.Errorf("user %q of the current context does not exist, or more than once", clip(context.Context.User))
	}
	c := &credentials{serverName: cluster.Cluster.ServerName}
	if err := c.takeCluster(cluster, dir); err != nil {
		return nil, fmt.Errorf("cluster %q: %w", clip(cluster.Name), err)
	}
	if err := c.takeUser(user, dir); err != nil {
		return nil, fmt.Errorf("user %q: %w", clip(user.Name), err)
	}
	return c, nil
}

var yamlLine = regexp.MustCompile(`line [0-9]+`)

// decodeKubeconfig reads the file without following it anywhere. The YAML library's messages repeat values, which can be
// secrets, so that only the line is told.
func decodeKubeconfig(data []byte) (*kubeFile, error) {
	var f kubeFile
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&f); errors.Is(err, io.EOF) {
		return nil, errors.New("the file is empty")
	} else if err != nil {
		where := yamlLine.FindString(err.Error())
		if where == "" {
			where = "some line"
		}
		return nil, fmt.Errorf("%s: not a kubeconfig, or with fields that are not supported", where)
	}
	var more any
	if err := decoder.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is a second document; one is allowed")
	}
	if f.Kind != "" && f.Kind != "Config" || f.APIVersion != "" && f.APIVersion != "v1" {
		return nil, fmt.Errorf("kind %q, apiVersion %q: not Config of v1", clip(f.Kind), clip(f.APIVersion))
	}
	return &f, nil
}

// find returns the one element that is meant. Two of one name are none: which of them counts is a matter of the reader.
func find[T any](list []T, meant func(T) bool) (T, bool) {
	var found T
	n := 0
	for _, e := range list {
		if meant(e) {
			found = e
			n++
		}
	}
	return found, n == 1
}

func (c *credentials) takeCluster(k kubeCluster, dir string) error {
	switch {
	case k.Cluster.Insecure:
		return errors.New("insecure-skip-tls-verify: refused; whoever answers would say which nodes exist. Use certificate-authority")
	case k.Cluster.ProxyURL != "":
		return errors.New("proxy-url: not supported; set HTTPS_PROXY in the CA's environment")
	}
	var err error
	if c.server, err = parseServer(k.Cluster.Server); err != nil {
		return err
	}
	ca, err := fileOrData(dir, "certificate-authority", k.Cluster.CA, k.Cluster.CAData)
	if err != nil {
		return err
	}
	if ca != nil { // without one, what the system trusts
		if c.roots, err = parseRoots(ca); err != nil {
			return fmt.Errorf("certificate-authority: %w", err)
		}
	}
	return nil
}

func (c *credentials) takeUser(u kubeUser, dir string) error {
	switch {
	case u.User.Exec != nil:
		return errors.New("exec: refused; the CA runs no programs for credentials. Use a token, a tokenFile or a client certificate, such as those of a service account made for the CA")
	case u.User.AuthProvider != nil:
		return errors.New("auth-provider: not supported; use a token, a tokenFile or a client certificate")
	case u.User.Username != "" || u.User.Password != "":
		return errors.New("username and password: not supported, by Kubernetes neither; use a token, a tokenFile or a client certificate")
	case u.User.As != "" || u.User.AsUID != "" || u.User.AsGroups != nil || u.User.AsUserExtra != nil:
		return errors.New("as: impersonation is not supported; use credentials that are the user's own")
	}
	cert, err := fileOrData(dir, "client-certificate", u.User.ClientCert, u.User.ClientCertData)
	if err != nil {
		return err
	}
	key, err := fileOrData(dir, "client-key", u.User.ClientKey, u.User.ClientKeyData)
	if err != nil {
		return err
	}
	if c.certificates, err = keyPair(cert, key); err != nil {
		return err
	}
	switch file := u.User.TokenFile; {
	case file != "": // it wins over token, as in kubectl
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		if c.token, err = readToken(file); err != nil {
			return fmt.Errorf("tokenFile: %w", err)
		}
	case u.User.Token != "":
		if err := checkToken(u.User.Token); err != nil {
			return fmt.Errorf("token: %w", err)
		}
		c.token = u.User.Token
	}
	if c.token == "" && len(c.certificates) == 0 {
		return errors.New("has neither token, tokenFile nor client-certificate")
	}
	return nil
}
