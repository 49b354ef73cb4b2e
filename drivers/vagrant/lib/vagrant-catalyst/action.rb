# frozen_string_literal: true

require "vagrant"
require "vagrant/action/builder"

require "vagrant-catalyst/action/create"
require "vagrant-catalyst/action/hostname"
require "vagrant-catalyst/action/ports"
require "vagrant-catalyst/action/power"
require "vagrant-catalyst/action/snapshots"
require "vagrant-catalyst/action/state"
require "vagrant-catalyst/action/vm"

module VagrantPlugins
  module Catalyst
    # What each of Vagrant's commands does, as a chain of middleware: what stands before others in a chain
    # acts after them where it needs a machine that runs (provisioners, folders, host name).
    module Action
      include Vagrant::Action::Builtin

      module_function

      def chain(&block)
        Vagrant::Action::Builder.new.tap(&block)
      end

      # A chain that goes on only with a machine that has been created, by its state.
      def of_created
        chain do |b|
          b.use Call, ReadState do |env, rest|
            if env[:result] == :not_created
              rest.use Tell, "vagrant.commands.common.vm_not_created"
            else
              yield env[:result], rest, env
            end
          end
        end
      end

      def action_up
        chain do |b|
          b.use HandleBox
          b.use ConfigValidate
          b.use BoxCheckOutdated
          b.use Call, ReadState do |env, rest|
            if env[:result] == :not_created
              rest.use Create
              rest.use action_boot
            else
              rest.use action_start
            end
          end
        end
      end

      # Of a machine that was created.
      def action_start
        chain do |b|
          b.use Call, ReadState do |env, rest|
            goes_on = [*RUNS, :suspended, :paused].include?(env[:result])
            rest.use(goes_on ? action_go_on : action_boot)
          end
        end
      end

      # Of a machine that is off, or a clone that runs already.
      def action_boot
        chain do |b|
          b.use KnowGuest
          b.use Provision
          b.use ForgetFolders
          b.use SyncedFolderCleanup
          b.use SyncedFolders
          b.use SetHostname
          b.use WarnOfUnsupported
          b.use Resize
          b.use ForwardPorts
          b.use PowerOn
          b.use WaitForCommunicator, RUNS
        end
      end

      # Of a machine that is suspended, paused or runs. What was forwarded and shared is so still.
      def action_go_on
        chain do |b|
          b.use KnowGuest
          b.use Provision
          b.use PowerOn
          b.use WaitForCommunicator, RUNS
        end
      end

      def action_halt
        of_created { |_, b| b.use PowerOff }
      end

      def action_reload
        of_created do |_, b|
          b.use ConfigValidate
          b.use PowerOff
          b.use action_boot
        end
      end

      def action_suspend
        of_created { |_, b| b.use Suspend }
      end

      def action_resume
        of_created do |state, b|
          if %i[suspended paused].include?(state)
            b.use ConfigValidate
            b.use action_go_on
          else
            b.use Tell, "vagrant_catalyst.not_suspended"
          end
        end
      end

      def action_destroy
        of_created do |_, b|
          b.use Call, DestroyConfirm do |env, rest|
            if env[:result]
              rest.use ConfigValidate
              rest.use ProvisionerCleanup, :before
              rest.use Destroy
              rest.use SyncedFolderCleanup
            else
              rest.use Tell, "vagrant.commands.destroy.will_not_destroy"
            end
          end
        end
      end

      def action_provision
        chain do |b|
          b.use ConfigValidate
          b.use MustRun
          b.use KnowGuest
          b.use Provision
        end
      end

      def action_ssh
        chain do |b|
          b.use MustRun
          b.use SSHExec
        end
      end

      def action_ssh_run
        chain do |b|
          b.use MustRun
          b.use SSHRun
        end
      end

      def action_snapshot_save
        of_created { |_, b| b.use SnapshotSave }
      end

      def action_snapshot_delete
        of_created { |_, b| b.use SnapshotDelete }
      end

      # Of one that has memory, the VM goes on from there at once, or is suspended there.
      def action_snapshot_restore
        of_created do |_, b|
          b.use SnapshotRestore
          b.use Call, IsEnvSet, :snapshot_delete do |env, rest|
            rest.use SnapshotDelete if env[:result]
          end
          b.use Call, IsEnvSet, :snapshot_start do |env, rest|
            rest.use action_start if env[:result]
          end
        end
      end

      # Another machine is cloned from this one while nothing else is done with it.
      def action_lend
        chain { |b| b.use Lend }
      end

      # Shares the folders with a machine that runs.
      def action_sync_folders
        chain do |b|
          b.use MustRun
          b.use KnowGuest
          b.use SyncedFolders
        end
      end
    end
  end
end
