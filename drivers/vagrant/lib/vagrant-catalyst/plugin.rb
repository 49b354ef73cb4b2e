# frozen_string_literal: true

require "vagrant"
require "vagrant-catalyst/version"

module VagrantPlugins
  module Catalyst
    # What Vagrant is told of this gem.
    class Plugin < Vagrant.plugin("2")
      name "catalyst"
      description "Makes and drives Catalyst VMs."

      # Loads the texts; done once, when the first of the gem's parts is used.
      def self.load_texts
        file = Catalyst.source_root.join("locales/en.yml").to_s
        return if I18n.load_path.include?(file)

        I18n.load_path << file
        I18n.reload!
      end

      config(:catalyst, :provider) do
        load_texts
        require "vagrant-catalyst/config"
        Config
      end

      # A box is optional: without one, VMs are made from a template of the daemon.
      provider(:catalyst, box_format: %w[libvirt vmware_desktop], box_optional: true, parallel: true) do
        load_texts
        require "vagrant-catalyst/provider"
        Provider
      end

      # As high as any other provider's own folders: before NFS, rsync and SMB.
      synced_folder(:catalyst, 10) do
        load_texts
        require "vagrant-catalyst/synced_folder"
        SyncedFolder
      end

      synced_folder_capability(:catalyst, "default_fstab_modification") do
        require "vagrant-catalyst/cap"
        Cap
      end

      %w[public_address forwarded_ports nic_mac_addresses snapshot_list].each do |name|
        provider_capability(:catalyst, name) do
          require "vagrant-catalyst/cap"
          Cap
        end
      end
    end
  end
end
